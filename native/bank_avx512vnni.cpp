// The loops of `bank_ffn` for AVX-512 with VNNI.
#include "activation.h"
#include "bank.h"

#if FALLOW_X86
#include <immintrin.h>

#define FALLOW_VNNI 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,popcnt,bmi")
namespace fallow::bank::avx512vnni {

constexpr bool kFma = true;
#include "bank_lanes_avx512.h"

#include "bank_kernels.h"

}  // namespace fallow::bank::avx512vnni
#pragma GCC pop_options

const fallow::bank::Kernels fallow::bank::avx512vnni_kernels = {
    fallow::bank::avx512vnni::W,         fallow::bank::avx512vnni::prepare,  fallow::bank::avx512vnni::dots,   fallow::bank::avx512vnni::round, fallow::bank::avx512vnni::coded_dots, fallow::bank::avx512vnni::magnitude,
    fallow::bank::avx512vnni::sigmoid2,  fallow::bank::avx512vnni::select,   fallow::bank::avx512vnni::mask,   fallow::bank::avx512vnni::ffn,   fallow::bank::avx512vnni::collect,
};
#endif
