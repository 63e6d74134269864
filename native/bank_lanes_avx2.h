// Lanes of bank_kernels.h for AVX2 and FMA. Bytes times bytes go through 16-bit sums: codes of at most 15 times at most 127, twice,
// leave room for eight.
constexpr int W = 8;
using F = __m256;
using I = __m256i;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float a) { return _mm256_set1_ps(a); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// the sums across lanes of four, together: transposing costs half of what four sums do
inline void sum4(const F* a, float* out) {
  const F ab = add(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
  const F cd = add(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
  const F each = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));  // in both halves
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(each), _mm256_extractf128_ps(each, 1)));
}

inline __m256i bytes32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline void halves(const bf16* p, F& even, F& odd) {
  const __m256i w = bytes32(p);
  even = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000u))));
}
inline F widen(const bf16* p) {
  const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
inline F from8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline I izero() { return _mm256_setzero_si256(); }
inline F to_floats(I a) { return _mm256_cvtepi32_ps(a); }
// a + the sums of neighbours of w * x, 2 W of them
inline I dot16(const int8_t* w, const int16_t* x, I a) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  return _mm256_add_epi32(a, _mm256_madd_epi16(wide, bytes32(x)));
}

// sums[m * N + n][half] = a group of 16 channels' codes, at codes[m], times the bytes of token n; `stride` bytes between tokens.
template <int kBits, int M, int N>
inline void code_sums(const uint8_t* const* codes, int64_t group, const int8_t* x, int64_t stride, F (*sums)[16 / W]) {
  constexpr int kPer = 8 / kBits;
  const __m256i low = _mm256_set1_epi8((1 << kBits) - 1), ones = _mm256_set1_epi16(1);
  for (int m = 0; m < M; ++m)
    for (int half = 0; half < 2; ++half) {
      __m256i total[N];
      for (int n = 0; n < N; ++n) total[n] = _mm256_setzero_si256();
      for (int64_t begin = 0; begin < group; begin += 32) {
        __m256i words[N];
        for (int n = 0; n < N; ++n) words[n] = _mm256_setzero_si256();
        const int64_t end = begin + 32 < group ? begin + 32 : group;
        for (int64_t at = begin; at < end; at += 4 * kPer) {
          const __m256i word = bytes32(codes[m] + at / kPer * 16 + 32 * half);
          for (int s = 0; s < kPer; ++s) {
            const __m256i code = _mm256_and_si256(s ? _mm256_srli_epi16(word, s * kBits) : word, low);
            for (int n = 0; n < N; ++n) {
              int32_t four;
              __builtin_memcpy(&four, x + n * stride + at + 4 * s, 4);
              words[n] = _mm256_add_epi16(words[n], _mm256_maddubs_epi16(code, _mm256_set1_epi32(four)));
            }
          }
        }
        for (int n = 0; n < N; ++n) total[n] = _mm256_add_epi32(total[n], _mm256_madd_epi16(words[n], ones));
      }
      for (int n = 0; n < N; ++n) sums[m * N + n][half] = _mm256_cvtepi32_ps(total[n]);
    }
}

// bit i: keys[i] > t, for W keys
inline uint32_t above(const int32_t* keys, int32_t t) {
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(bytes32(keys), _mm256_set1_epi32(t)))));
}
