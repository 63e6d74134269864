// The loops of `bank_ffn` for AVX-512 with VNNI.
#include "activation.h"
#include "bank.h"

#if FALLOW_X86
#include <immintrin.h>

#define FALLOW_VNNI 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,popcnt,bmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,popcnt,bmi")
#endif
namespace fallow::bank::avx512vnni {

constexpr bool kFma = true;
#include "bank_lanes_avx512.h"

#include "bank_kernels.h"

}  // namespace fallow::bank::avx512vnni
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fallow::bank {

namespace k = avx512vnni;
const Kernels avx512vnni_kernels = {k::W,        k::prepare, k::dots, k::round, k::coded_dots, k::magnitude,
                              k::sigmoid2, k::select,  k::mask, k::ffn,   k::collect};

}  // namespace fallow::bank
#endif
