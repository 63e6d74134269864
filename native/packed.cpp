// Packed sparse weights: one bit per weight plus the active entries in row-major order. `expand` writes a dense matrix with zeros in
// the inactive places, `compress` takes the active entries of a dense matrix. Index lists (CSR) would cost 4 bytes per active entry
// and twice the traffic. Both are bound by memory: AVX-512 does 16 or 32 weights per instruction, AVX2 eight, plain C++ one.
// Bit j of byte i of a row is column 8i+j; bits past the last column are 0.
#include "simd.h"

#if FALLOW_X86
#include <immintrin.h>
#define FALLOW_EXPAND32 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,popcnt")))
#define FALLOW_VBMI2 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,popcnt")))
#define FALLOW_AVX2P __attribute__((target("avx2,popcnt")))
#endif

namespace fallow {

struct Packed {
  const uint8_t* bitmap;  // [rows, stride]
  const int64_t* start;   // [rows + 1]: first entry of each row in the packed vector
  int64_t rows, cols, stride;
};

// -- plain C++ ------------------------------------------------------------------------------------------------------------------

template <class T>
void expand_portable(const Packed& p, const T* values, T* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* bits = p.bitmap + row * p.stride;
    const T* next = values + p.start[row];
    T* to = out + row * p.cols;
    for (int64_t c = 0; c < p.cols; ++c) {
      const bool on = (bits[c >> 3] >> (c & 7)) & 1;
      to[c] = on ? *next : T(0);
      next += on;
    }
  }
}

template <class T>
void compress_portable(const Packed& p, const T* dense, T* values, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* bits = p.bitmap + row * p.stride;
    T* next = values + p.start[row];
    const T* from = dense + row * p.cols;
    for (int64_t i = 0; i < p.stride; ++i)
      for (unsigned byte = bits[i]; byte; byte &= byte - 1) *next++ = from[8 * i + __builtin_ctz(byte)];
  }
}

#if FALLOW_X86

// -- AVX-512: the instruction set has both operations -----------------------------------------------------------------------------

inline bool has_vbmi2() {
  static const bool found = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vbmi2") != 0;
  }();
  return found;
}

// Loads past the last entry of the row are suppressed by the memory form of the instruction, so no page is touched needlessly.
FALLOW_EXPAND32 void expand_avx512(const Packed& p, const uint32_t* values, uint32_t* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* bits = p.bitmap + row * p.stride;
    const uint32_t* next = values + p.start[row];
    uint32_t* to = out + row * p.cols;
    int64_t c = 0;
    for (; c + 16 <= p.cols; c += 16) {
      uint16_t mask;
      std::memcpy(&mask, bits + (c >> 3), 2);
      _mm512_storeu_si512(to + c, _mm512_maskz_expandloadu_epi32(mask, next));
      next += __builtin_popcount(mask);
    }
    for (; c < p.cols; ++c) {
      const bool on = (bits[c >> 3] >> (c & 7)) & 1;
      to[c] = on ? *next : 0u;
      next += on;
    }
  }
}

FALLOW_VBMI2 void expand_avx512(const Packed& p, const uint16_t* values, uint16_t* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* bits = p.bitmap + row * p.stride;
    const uint16_t* next = values + p.start[row];
    uint16_t* to = out + row * p.cols;
    int64_t c = 0;
    for (; c + 32 <= p.cols; c += 32) {
      uint32_t mask;
      std::memcpy(&mask, bits + (c >> 3), 4);
      _mm512_storeu_si512(to + c, _mm512_maskz_expandloadu_epi16(mask, next));
      next += __builtin_popcount(mask);
    }
    for (; c < p.cols; ++c) {
      const bool on = (bits[c >> 3] >> (c & 7)) & 1;
      to[c] = on ? *next : uint16_t(0);
      next += on;
    }
  }
}

// Compressing in a register and storing under a mask: the storing form of vpcompress is microcoded on some CPUs.
FALLOW_EXPAND32 void compress_avx512(const Packed& p, const uint32_t* dense, uint32_t* values, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* bits = p.bitmap + row * p.stride;
    uint32_t* next = values + p.start[row];
    const uint32_t* from = dense + row * p.cols;
    int64_t c = 0;
    for (; c + 16 <= p.cols; c += 16) {
      uint16_t mask;
      std::memcpy(&mask, bits + (c >> 3), 2);
      const int n = __builtin_popcount(mask);
      _mm512_mask_storeu_epi32(next, __mmask16((1u << n) - 1u), _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(from + c)));
      next += n;
    }
    for (; c < p.cols; ++c)
      if ((bits[c >> 3] >> (c & 7)) & 1) *next++ = from[c];
  }
}

FALLOW_VBMI2 void compress_avx512(const Packed& p, const uint16_t* dense, uint16_t* values, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* bits = p.bitmap + row * p.stride;
    uint16_t* next = values + p.start[row];
    const uint16_t* from = dense + row * p.cols;
    int64_t c = 0;
    for (; c + 32 <= p.cols; c += 32) {
      uint32_t mask;
      std::memcpy(&mask, bits + (c >> 3), 4);
      const int n = __builtin_popcount(mask);
      _mm512_mask_storeu_epi16(next, __mmask32((uint64_t(1) << n) - 1u),
                               _mm512_maskz_compress_epi16(mask, _mm512_loadu_si512(from + c)));
      next += n;
    }
    for (; c < p.cols; ++c)
      if ((bits[c >> 3] >> (c & 7)) & 1) *next++ = from[c];
  }
}

// -- AVX2: eight weights per byte of the bitmap, by a table of shuffles ------------------------------------------------------------

struct Shuffles {
  alignas(16) uint8_t expand16[256][16], compress16[256][16];  // byte controls for 8 × 16 bit
  alignas(32) uint32_t expand32[256][8], compress32[256][8];   // lane numbers for 8 × 32 bit
  alignas(32) uint32_t on32[256][8];                           // all ones where active
  Shuffles() {
    for (int b = 0; b < 256; ++b) {
      int rank = 0;
      for (int j = 0; j < 8; ++j) {
        const bool on = (b >> j) & 1;
        expand32[b][j] = uint32_t(on ? rank : 0);
        on32[b][j] = on ? ~0u : 0u;
        for (int h = 0; h < 2; ++h) expand16[b][2 * j + h] = uint8_t(on ? 2 * rank + h : 0x80);
        if (on) {
          compress32[b][rank] = uint32_t(j);
          for (int h = 0; h < 2; ++h) compress16[b][2 * rank + h] = uint8_t(2 * j + h);
          ++rank;
        }
      }
      for (; rank < 8; ++rank) {
        compress32[b][rank] = 0;
        for (int h = 0; h < 2; ++h) compress16[b][2 * rank + h] = 0x80;
      }
    }
  }
};

inline const Shuffles& shuffles() {
  static const Shuffles table;
  return table;
}

FALLOW_AVX2P inline void expand8(const Shuffles& s, unsigned byte, const uint16_t* from, uint16_t* to) {
  const __m128i control = _mm_load_si128(reinterpret_cast<const __m128i*>(s.expand16[byte]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), control));
}
FALLOW_AVX2P inline void expand8(const Shuffles& s, unsigned byte, const uint32_t* from, uint32_t* to) {
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(s.expand32[byte]));
  const __m256i on = _mm256_load_si256(reinterpret_cast<const __m256i*>(s.on32[byte]));
  const __m256i found = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), lanes);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_and_si256(found, on));
}
FALLOW_AVX2P inline void compress8(const Shuffles& s, unsigned byte, const uint16_t* from, uint16_t* to) {
  const __m128i control = _mm_load_si128(reinterpret_cast<const __m128i*>(s.compress16[byte]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), control));
}
FALLOW_AVX2P inline void compress8(const Shuffles& s, unsigned byte, const uint32_t* from, uint32_t* to) {
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(s.compress32[byte]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), lanes));
}

// A vector is read or written eight wide only where all eight places belong to this call's rows: past them lie another
// thread's entries, or nobody's.
template <class T>
FALLOW_AVX2P void expand_avx2(const Packed& p, const T* values, T* out, int64_t begin, int64_t end) {
  const Shuffles& s = shuffles();
  const T* last = values + p.start[end];
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* bits = p.bitmap + row * p.stride;
    const T* next = values + p.start[row];
    T* to = out + row * p.cols;
    for (int64_t c = 0; c < p.cols; c += 8) {
      const unsigned byte = bits[c >> 3];
      if (c + 8 <= p.cols && next + 8 <= last) {
        expand8(s, byte, next, to + c);
        next += __builtin_popcount(byte);
        continue;
      }
      for (int64_t j = 0; j < 8 && c + j < p.cols; ++j) {
        const bool on = (byte >> j) & 1;
        to[c + j] = on ? *next : T(0);
        next += on;
      }
    }
  }
}

template <class T>
FALLOW_AVX2P void compress_avx2(const Packed& p, const T* dense, T* values, int64_t begin, int64_t end) {
  const Shuffles& s = shuffles();
  const T* last = values + p.start[end];
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* bits = p.bitmap + row * p.stride;
    T* next = values + p.start[row];
    const T* from = dense + row * p.cols;
    for (int64_t c = 0; c < p.cols; c += 8) {
      const unsigned byte = bits[c >> 3];
      if (c + 8 <= p.cols && next + 8 <= last) {
        compress8(s, byte, from + c, next);
        next += __builtin_popcount(byte);
        continue;
      }
      for (unsigned left = byte; left; left &= left - 1) *next++ = from[c + __builtin_ctz(left)];
    }
  }
}

#endif  // FALLOW_X86

// level: -1 chooses; 0, 1, 2 ask for plain C++, AVX2 or AVX-512 (for tests), as far as this CPU has it.
template <class T>
void expand(const Packed& p, const T* values, T* out, int64_t begin, int64_t end, int level) {
#if FALLOW_X86
  const int top = int(isa());
  const int use = level < 0 ? top : std::min(level, top);
  if constexpr (sizeof(T) >= 2) {
    if (use == int(Isa::avx512) && (sizeof(T) == 4 || has_vbmi2())) return expand_avx512(p, values, out, begin, end);
    if (use >= int(Isa::avx2)) return expand_avx2(p, values, out, begin, end);
  }
#endif
  expand_portable(p, values, out, begin, end);
}

template <class T>
void compress(const Packed& p, const T* dense, T* values, int64_t begin, int64_t end, int level) {
#if FALLOW_X86
  const int top = int(isa());
  const int use = level < 0 ? top : std::min(level, top);
  if constexpr (sizeof(T) >= 2) {
    if (use == int(Isa::avx512) && (sizeof(T) == 4 || has_vbmi2())) return compress_avx512(p, dense, values, begin, end);
    if (use >= int(Isa::avx2)) return compress_avx2(p, dense, values, begin, end);
  }
#endif
  compress_portable(p, dense, values, begin, end);
}

}  // namespace fallow

using namespace fallow;

// Entries are moved as bits: `bytes` (1, 2 or 4) is the size of one, whatever it means.
FALLOW_API void fallow_expand(const void* values, const uint8_t* bitmap, const int64_t* start, void* out, int64_t rows, int64_t cols,
                              int bytes, int n_threads, int level) {
  const Packed p{bitmap, start, rows, cols, (cols + 7) / 8};
  parallel(rows, n_threads, [&](int64_t begin, int64_t end) {
    if (bytes == 4) expand(p, static_cast<const uint32_t*>(values), static_cast<uint32_t*>(out), begin, end, level);
    else if (bytes == 2) expand(p, static_cast<const uint16_t*>(values), static_cast<uint16_t*>(out), begin, end, level);
    else expand(p, static_cast<const uint8_t*>(values), static_cast<uint8_t*>(out), begin, end, level);
  });
}

FALLOW_API void fallow_compress(const void* dense, const uint8_t* bitmap, const int64_t* start, void* values, int64_t rows,
                                int64_t cols, int bytes, int n_threads, int level) {
  const Packed p{bitmap, start, rows, cols, (cols + 7) / 8};
  parallel(rows, n_threads, [&](int64_t begin, int64_t end) {
    if (bytes == 4) compress(p, static_cast<const uint32_t*>(dense), static_cast<uint32_t*>(values), begin, end, level);
    else if (bytes == 2) compress(p, static_cast<const uint16_t*>(dense), static_cast<uint16_t*>(values), begin, end, level);
    else compress(p, static_cast<const uint8_t*>(dense), static_cast<uint8_t*>(values), begin, end, level);
  });
}
