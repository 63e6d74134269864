// The loops of `bank_ffn` for AVX2.
#include "activation.h"
#include "bank.h"

#if FALLOW_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi")
namespace fallow::bank::avx2 {

constexpr bool kFma = true;
#include "bank_lanes_avx2.h"

#include "bank_kernels.h"

}  // namespace fallow::bank::avx2
#pragma GCC pop_options

const fallow::bank::Kernels fallow::bank::avx2_kernels = {
    fallow::bank::avx2::W,         fallow::bank::avx2::prepare,  fallow::bank::avx2::dots,   fallow::bank::avx2::round, fallow::bank::avx2::coded_dots, fallow::bank::avx2::magnitude,
    fallow::bank::avx2::sigmoid2,  fallow::bank::avx2::select,   fallow::bank::avx2::mask,   fallow::bank::avx2::ffn,   fallow::bank::avx2::collect,
};
#endif
