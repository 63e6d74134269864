// What every kernel shares: bf16 <-> fp32, one loop body compiled for AVX-512, AVX2 and plain C++ and chosen at run time,
// and a fork-safe parallel loop. No -march flag: the wheel runs on any CPU of its architecture. The obvious alternative,
// hand-written intrinsics per instruction set, triples the code for kernels that are bound by memory anyway.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define FALLOW_INLINE inline __attribute__((always_inline))
#define FALLOW_API extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define FALLOW_X86 1
#define FALLOW_AVX2 __attribute__((target("avx2,fma")))
#define FALLOW_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define FALLOW_X86 0
#endif

namespace fallow {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

inline Isa isa() {
#if FALLOW_X86
  static const Isa found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
    return Isa::portable;
  }();
  return found;
#else
  return Isa::portable;
#endif
}

struct bf16 {
  uint16_t bits;
};

FALLOW_INLINE float to_float(float x) { return x; }
FALLOW_INLINE float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Round to nearest, ties to even; NaN stays NaN. Integer arithmetic, because vcvtneps2bf16 flushes subnormals and torch does not.
FALLOW_INLINE void from_float(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  out->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
FALLOW_INLINE void from_float(float x, float* out) { *out = x; }

// a*b + c; fused where the instruction set has it. A fused multiply-add without hardware is a slow library call.
template <bool kFma>
FALLOW_INLINE float madd(float a, float b, float c) {
  if constexpr (kFma) return __builtin_fmaf(a, b, c);
  return a * b + c;
}

// Kernel::run<kFma>(args...) must be always_inline: it is then compiled once inside each of these three.
#if FALLOW_X86
template <class Kernel, class... Args>
FALLOW_AVX512 void run_avx512(Args... args) {
  Kernel::template run<true>(args...);
}
template <class Kernel, class... Args>
FALLOW_AVX2 void run_avx2(Args... args) {
  Kernel::template run<true>(args...);
}
#endif
template <class Kernel, class... Args>
void run_portable(Args... args) {
  Kernel::template run<false>(args...);
}

template <class Kernel, class... Args>
void dispatch(Args... args) {
#if FALLOW_X86
  if (isa() == Isa::avx512) return run_avx512<Kernel, Args...>(args...);
  if (isa() == Isa::avx2) return run_avx2<Kernel, Args...>(args...);
#endif
  run_portable<Kernel, Args...>(args...);
}

// work(begin, end) over [0, items) on n_threads threads, the caller being one of them. Threads are started per call (about 20 us
// each): a pool would not survive fork(), which data loaders use.
template <class Work>
void parallel(int64_t items, int n_threads, const Work& work) {
  const int64_t n = std::max<int64_t>(1, std::min<int64_t>(n_threads, items));
  std::vector<std::thread> threads;
  threads.reserve(size_t(n - 1));
  for (int64_t i = 1; i < n; ++i) threads.emplace_back([&work, i, n, items] { work(i * items / n, (i + 1) * items / n); });
  work(int64_t(0), items / n);
  for (auto& thread : threads) thread.join();
}

}  // namespace fallow
