// Blocks of 32 x 32 bf16 for AMX: cutting matrices up into them, multiplying them, rounding the sums. Such a block is 2 KB, in the
// order that one instruction reads it: as a left operand two halves of 16 rows; as a right operand two halves of 16 columns, with
// pairs of the inner dimension side by side. `mask` marks the columns that are there, `rows` counts the rows; the rest becomes zero.
#pragma once

#include "simd.h"

#if FALLOW_X86 && defined(__linux__) && defined(__has_include)
#if (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)) && (!defined(__clang_major__) || __clang_major__ >= 12)
#define FALLOW_AMX 1
#endif
#endif

#if FALLOW_AMX
#include <immintrin.h>

#define FALLOW_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))

namespace fallow {

constexpr int64_t kSide = 32;              // of a block
constexpr int64_t kBlock = kSide * kSide;  // its entries

// -- cutting up -------------------------------------------------------------------------------------------------------------------

FALLOW_TILES inline __m512i row_of(const bf16* from, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, from); }

inline __mmask32 mask_of(int64_t columns) {
  return columns >= kSide ? ~__mmask32(0) : columns <= 0 ? __mmask32(0) : __mmask32((1u << columns) - 1u);
}

FALLOW_TILES inline void transpose16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + j] holds column 4l + j of rows i..i+3 in its lane l
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88), t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd), t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Rows 2p and 2p + 1 of a block, entry by entry: the first 16 columns into low[p], the others into high[p].
FALLOW_TILES inline void interleave(const bf16* from, int64_t stride, int64_t rows, __mmask32 mask, __m512i* low, __m512i* high) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kLow), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
#pragma GCC unroll 16
  for (int64_t p = 0; p < 16; ++p) {
    const __m512i even = 2 * p < rows ? row_of(from + 2 * p * stride, mask) : _mm512_setzero_si512();
    const __m512i odd = 2 * p + 1 < rows ? row_of(from + (2 * p + 1) * stride, mask) : _mm512_setzero_si512();
    low[p] = _mm512_permutex2var_epi16(even, first, odd), high[p] = _mm512_permutex2var_epi16(even, second, odd);
  }
}

FALLOW_TILES inline void put16(const __m512i* r, bf16* to) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kSide, r[i]);
}

// Right operand whose inner dimension is the rows of `from` [rows, columns of the mask].
FALLOW_TILES inline void cut_right(const bf16* from, int64_t stride, int64_t rows, __mmask32 mask, bf16* to) {
  __m512i low[16], high[16];
  interleave(from, stride, rows, mask, low, high);
  put16(low, to), put16(high, to + kBlock / 2);
}

// Right operand whose inner dimension is the columns of `from`.
FALLOW_TILES inline void cut_right_across(const bf16* from, int64_t stride, int64_t rows, __mmask32 mask, bf16* to) {
  for (int64_t half = 0; half < 2; ++half, from += 16 * stride, rows -= 16, to += kBlock / 2) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = i < rows ? row_of(from + i * stride, mask) : _mm512_setzero_si512();
    transpose16(r);
    put16(r, to);
  }
}

// Left operand whose inner dimension is the rows of `from`.
FALLOW_TILES inline void cut_left_across(const bf16* from, int64_t stride, int64_t rows, __mmask32 mask, bf16* to) {
  __m512i low[16], high[16];
  interleave(from, stride, rows, mask, low, high);
  transpose16(low), transpose16(high);
  put16(low, to), put16(high, to + kBlock / 2);
}

// Left operand whose inner dimension is the columns.
FALLOW_TILES inline void cut_left(const bf16* from, int64_t stride, int64_t rows, __mmask32 mask, bf16* to) {
#pragma GCC unroll 8
  for (int64_t t = 0; t < kSide; ++t)
    _mm512_store_si512(to + t * kSide, t < rows ? row_of(from + t * stride, mask) : _mm512_setzero_si512());
}

// -- products ---------------------------------------------------------------------------------------------------------------------

FALLOW_TILES inline void open_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  __asm__ volatile("" : : "r"(&config) : "memory");  // the intrinsic tells the compiler of the first 8 bytes only
  _tile_loadconfig(&config);
}

FALLOW_TILES inline void close_tiles() { _tile_release(); }  // else every context switch saves 8 KB

// What to fetch into L2 during the next `steps` steps of products.
struct Ahead {
  const bf16 *next, *end;
  int64_t lines;
  Ahead(const bf16* begin, const bf16* end, int64_t steps)
      : next(begin), end(end), lines(ceil_div(ceil_div(end - begin, kSide), std::max<int64_t>(1, steps))) {}
  FALLOW_TILES FALLOW_INLINE void fetch() {
    for (int64_t i = 0; i < lines && next < end; ++i, next += kSide)
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
  }
};

// c [32, 32] (+)= sum over the blocks of `count` runs of a, `steps` each, at a[offset[q]], times as many blocks of b in a row.
FALLOW_TILES inline void multiply(const bf16* a, const int64_t* offset, int64_t count, int64_t steps, const bf16* b, float* c,
                                  bool first, Ahead& ahead) {
  constexpr int64_t kRow = kSide * 4;
  __asm__ volatile("" ::: "memory");  // a tile load does not tell the compiler that it reads memory
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, kRow);
    _tile_loadd(1, c + 16, kRow);
    _tile_loadd(2, c + 16 * kSide, kRow);
    _tile_loadd(3, c + 16 * kSide + 16, kRow);
  }
  for (int64_t q = 0; q < count; ++q) {
    const bf16* left = a + offset[q];
    for (int64_t k = 0; k < steps; ++k, left += kBlock, b += kBlock) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, left, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kBlock / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, left + kBlock / 2, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      ahead.fetch();
    }
  }
  _tile_stored(0, c, kRow);
  _tile_stored(1, c + 16, kRow);
  _tile_stored(2, c + 16 * kSide, kRow);
  _tile_stored(3, c + 16 * kSide + 16, kRow);
}

// to [rows, mask] = c + bias, rounded to nearest even. (This conversion flushes subnormals, of which AMX sums hold none.)
FALLOW_TILES inline void emit(const float* c, const float* bias, bf16* to, int64_t stride, int64_t rows, __mmask32 mask) {
  const __m512 low = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
  const __m512 high = bias ? _mm512_loadu_ps(bias + 16) : _mm512_setzero_ps();
  for (int64_t t = 0; t < rows; ++t, c += kSide, to += stride) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_add_ps(_mm512_load_ps(c + 16), high), _mm512_add_ps(_mm512_load_ps(c), low));
    _mm512_mask_storeu_epi16(to, mask, (__m512i)both);
  }
}

}  // namespace fallow

#endif
