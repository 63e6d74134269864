// The loops of `bank_ffn` for AVX2.
#include "activation.h"
#include "bank.h"

#if FALLOW_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt,bmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi")
#endif
namespace fallow::bank::avx2 {

constexpr bool kFma = true;
#include "bank_lanes_avx2.h"

#include "bank_kernels.h"

}  // namespace fallow::bank::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fallow::bank {

namespace k = avx2;
const Kernels avx2_kernels = {k::W,        k::prepare, k::dots, k::round, k::coded_dots, k::magnitude,
                              k::sigmoid2, k::select,  k::mask, k::ffn,   k::collect};

}  // namespace fallow::bank
#endif
