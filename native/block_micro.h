// Register blocks for native/block.cpp: c (+)= a w in fp32 with all of a block of c in registers, for AVX-512, AVX2 and plain C++.
// Not one body compiled three times as in simd.h: the best block differs with the number of registers. Measured in L1 on Sapphire
// Rapids: 170 of 175 GFLOP/s per core, against 163 with a stride known at run time only (it costs address arithmetic and spills).
#pragma once

#include <utility>

#include "simd.h"

#if FALLOW_X86
#include <immintrin.h>
#endif

namespace fallow {

// c[m, n] (+)= sum over `count` operand pairs and over k < depth of a(m, k) w(k, n), with rows of c and of w `stride` apart.
// kAcross: a(m, k) = a[k * stride + m] (tile gradients, where k counts tokens), else a[m * stride + k].
struct Product {
  const float* const* a;
  const float* const* w;
  int64_t count, depth, stride;
  float* c;
  bool first;  // c is not read
};
using Micro = void (*)(const Product&, int64_t a_offset, int64_t w_offset);

template <int M, int N, bool kAcross>
struct Plain {
  static void run(const Product& p, int64_t a_offset, int64_t w_offset) {
    float sum[M][N] = {};
    if (!p.first)
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sum[m][n] = p.c[m * p.stride + n];
    for (int64_t q = 0; q < p.count; ++q) {
      const float *a = p.a[q] + a_offset, *w = p.w[q] + w_offset;
      for (int64_t k = 0; k < p.depth; ++k, w += p.stride)
        for (int m = 0; m < M; ++m) {
          const float left = kAcross ? a[k * p.stride + m] : a[m * p.stride + k];
          for (int n = 0; n < N; ++n) sum[m][n] += left * w[n];
        }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) p.c[m * p.stride + n] = sum[m][n];
  }
};

#if FALLOW_X86
// I numbers the accumulators: constant subscripts from the start keep the array in registers. kStride 0: known at run time.
// Each step of k prefetches a share of what the next call needs (128 -> 147 GFLOP/s on panels in L2 and L3): the next rows of a and
// of c, or the next tokens of a and w.
#define FALLOW_MICRO(NAME, TARGET, VECTOR, LANES, PREFIX)                                                                        \
  template <int N, bool kAcross, int kStride, size_t... I>                                                                       \
  TARGET FALLOW_INLINE void NAME##_body(std::index_sequence<I...>, const Product& p, int64_t a_offset, int64_t w_offset) {       \
    constexpr int64_t kRows = sizeof...(I) / N;                                                                                  \
    const int64_t stride = kStride ? kStride : p.stride, next_m = kAcross ? 1 : stride, next_k = kAcross ? stride : 1;           \
    VECTOR sum[sizeof...(I)], right[N];                                                                                          \
    if (p.first) ((sum[I] = PREFIX##_setzero_ps()), ...);                                                                        \
    else ((sum[I] = PREFIX##_loadu_ps(p.c + (I / N) * stride + (I % N) * LANES)), ...);                                          \
    for (int64_t q = 0; q < p.count; ++q) {                                                                                      \
      const float *a = p.a[q] + a_offset, *w = p.w[q] + w_offset;                                                                \
      const int64_t ahead = p.depth * (stride + a_offset);                                                                       \
      const float* soon = kAcross ? p.a[q] + ahead : a + kRows * stride;                                                         \
      const float* also = kAcross ? p.w[q] + ahead : p.c + kRows * stride;                                                       \
      for (int64_t k = 0; k < p.depth; ++k, a += next_k, w += stride) {                                                          \
        __builtin_prefetch(soon + k * kRows);                                                                                    \
        __builtin_prefetch(also + k * kRows);                                                                                    \
        ((I < N ? void(right[I % N] = PREFIX##_loadu_ps(w + (I % N) * LANES)) : void()), ...);                                   \
        ((sum[I] = PREFIX##_fmadd_ps(PREFIX##_set1_ps(a[(I / N) * next_m]), right[I % N], sum[I])), ...);                        \
      }                                                                                                                          \
    }                                                                                                                            \
    (PREFIX##_storeu_ps(p.c + (I / N) * stride + (I % N) * LANES, sum[I]), ...);                                                 \
  }                                                                                                                              \
  template <int M, int N, bool kAcross>                                                                                          \
  struct NAME {                                                                                                                  \
    TARGET static void run(const Product& p, int64_t a_offset, int64_t w_offset) {                                               \
      constexpr auto all = std::make_index_sequence<M * N / LANES>();                                                            \
      if (p.stride == N) NAME##_body<N / LANES, kAcross, N>(all, p, a_offset, w_offset);                                         \
      else NAME##_body<N / LANES, kAcross, 0>(all, p, a_offset, w_offset);                                                       \
    }                                                                                                                            \
  };
FALLOW_MICRO(Wide, FALLOW_AVX512, __m512, 16, _mm512)
FALLOW_MICRO(Half, FALLOW_AVX2, __m256, 8, _mm256)
#undef FALLOW_MICRO
#endif

struct Shape {
  Micro run;
  int m, n;
};

// The register block for what is left of c: `rows` (a multiple of 4) by `cols` (a multiple of 16).
template <bool kAcross>
Shape shape_for(Isa level, int64_t rows, int64_t cols) {
  const bool fours = rows == 4 || rows == 8;
#if FALLOW_X86
  if (level == Isa::avx512) {
    if (cols >= 64) return fours ? Shape{Wide<4, 64, kAcross>::run, 4, 64} : Shape{Wide<6, 64, kAcross>::run, 6, 64};
    if (cols >= 48) return {Wide<8, 48, kAcross>::run, 8, 48};
    if (cols >= 32) return {Wide<8, 32, kAcross>::run, 8, 32};
    return {Wide<16, 16, kAcross>::run, 16, 16};
  }
  if (level == Isa::avx2) return fours ? Shape{Half<4, 16, kAcross>::run, 4, 16} : Shape{Half<6, 16, kAcross>::run, 6, 16};
#endif
  return {Plain<4, 16, kAcross>::run, 4, 16};
}

// All of c: `rows` by the width of the tile.
template <bool kAcross>
void multiply(Isa level, Product p, int64_t rows) {
  float* c = p.c;
  for (int64_t n = 0, n_step; n < p.stride; n += n_step)
    for (int64_t m = 0, m_step; m < rows; m += m_step) {
      const Shape s = shape_for<kAcross>(level, rows - m, p.stride - n);
      m_step = s.m, n_step = s.n;
      p.c = c + m * p.stride + n;
      s.run(p, kAcross ? m : m * p.stride, n);
    }
}

#if FALLOW_X86
FALLOW_AVX512 inline void transpose16(const float* from, float* to, int64_t stride) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
#define FALLOW_PD(op, a, b) _mm512_castpd_ps(op(_mm512_castps_pd(a), _mm512_castps_pd(b)))
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + j] holds column 4l + j of rows i..i+3 in its lane l
    r[i] = FALLOW_PD(_mm512_unpacklo_pd, t[i], t[i + 2]), r[i + 1] = FALLOW_PD(_mm512_unpackhi_pd, t[i], t[i + 2]);
    r[i + 2] = FALLOW_PD(_mm512_unpacklo_pd, t[i + 1], t[i + 3]), r[i + 3] = FALLOW_PD(_mm512_unpackhi_pd, t[i + 1], t[i + 3]);
  }
#undef FALLOW_PD
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * stride, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(to + (4 + j) * stride, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(to + (8 + j) * stride, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(to + (12 + j) * stride, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
}
#endif

// to[j, i] = from[i, j], both [block, block].
inline void transpose(Isa level, const float* from, float* to, int64_t block) {
#if FALLOW_X86
  if (level == Isa::avx512) {
    for (int64_t i = 0; i < block; i += 16)
      for (int64_t j = 0; j < block; j += 16) transpose16(from + i * block + j, to + j * block + i, block);
    return;
  }
#endif
  for (int64_t j = 0; j < block; ++j)
    for (int64_t i = 0; i < block; ++i) to[j * block + i] = from[i * block + j];
}

}  // namespace fallow
