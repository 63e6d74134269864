// The loops of `bank_ffn` for AVX-512.
#include "activation.h"
#include "bank.h"

#if FALLOW_X86
#include <immintrin.h>

#define FALLOW_VNNI 0
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,bmi")
namespace fallow::bank::avx512 {

constexpr bool kFma = true;
#include "bank_lanes_avx512.h"

#include "bank_kernels.h"

}  // namespace fallow::bank::avx512
#pragma GCC pop_options

const fallow::bank::Kernels fallow::bank::avx512_kernels = {
    fallow::bank::avx512::W,         fallow::bank::avx512::prepare,  fallow::bank::avx512::dots,   fallow::bank::avx512::round, fallow::bank::avx512::coded_dots, fallow::bank::avx512::magnitude,
    fallow::bank::avx512::sigmoid2,  fallow::bank::avx512::select,   fallow::bank::avx512::mask,   fallow::bank::avx512::ffn,   fallow::bank::avx512::collect,
};
#endif
