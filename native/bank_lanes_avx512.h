// Lanes of bank_kernels.h for AVX-512, with VNNI where FALLOW_VNNI is 1. Without it, bytes times bytes go through 16-bit sums: codes
// of at most 15 times at most 127, twice, leave room for eight.
constexpr int W = 16;
using F = __m512;
using I = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float a) { return _mm512_set1_ps(a); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// the sums across lanes of four, together: transposing costs half of what four sums do
inline void sum4(const F* a, float* out) {
  const F ab = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  const F cd = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  const F each = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));  // in every 128 bits
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(each), _mm512_extractf32x8_ps(each, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline void halves(const bf16* p, F& even, F& odd) {
  const __m512i w = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000u))));
}
inline F widen(const bf16* p) {
  const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
inline F from8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline I izero() { return _mm512_setzero_si512(); }
inline F to_floats(I a) { return _mm512_cvtepi32_ps(a); }
// a + the sums of neighbours of w * x, 2 W of them
inline I dot16(const int8_t* w, const int16_t* x, I a) {
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
#if FALLOW_VNNI
  return _mm512_dpwssd_epi32(a, wide, _mm512_loadu_si512(x));
#else
  return _mm512_add_epi32(a, _mm512_madd_epi16(wide, _mm512_loadu_si512(x)));
#endif
}

// sums[m * N + n] = a group of 16 channels' codes, at codes[m], times the bytes of token n; `stride` bytes between tokens.
template <int kBits, int M, int N>
inline void code_sums(const uint8_t* const* codes, int64_t group, const int8_t* x, int64_t stride, F (*sums)[16 / W]) {
  constexpr int kPer = 8 / kBits;
  const __m512i low = _mm512_set1_epi8((1 << kBits) - 1);
  __m512i total[M * N];
  for (int i = 0; i < M * N; ++i) total[i] = _mm512_setzero_si512();
  const auto each = [&](int64_t begin, int64_t end, const auto& accumulate) {
    for (int64_t at = begin; at < end; at += 4 * kPer)
      for (int m = 0; m < M; ++m) {
        const __m512i word = _mm512_loadu_si512(codes[m] + at / kPer * 16);
        for (int s = 0; s < kPer; ++s) {
          const __m512i code = _mm512_and_si512(s ? _mm512_srli_epi16(word, s * kBits) : word, low);
          for (int n = 0; n < N; ++n) {
            int32_t four;
            __builtin_memcpy(&four, x + n * stride + at + 4 * s, 4);
            accumulate(m * N + n, code, _mm512_set1_epi32(four));
          }
        }
      }
  };
#if FALLOW_VNNI
  each(0, group, [&](int i, __m512i code, __m512i four) { total[i] = _mm512_dpbusd_epi32(total[i], code, four); });
#else
  const __m512i ones = _mm512_set1_epi16(1);
  for (int64_t begin = 0; begin < group; begin += 32) {
    __m512i words[M * N];
    for (int i = 0; i < M * N; ++i) words[i] = _mm512_setzero_si512();
    each(begin, begin + 32 < group ? begin + 32 : group,
         [&](int i, __m512i code, __m512i four) { words[i] = _mm512_add_epi16(words[i], _mm512_maddubs_epi16(code, four)); });
    for (int i = 0; i < M * N; ++i) total[i] = _mm512_add_epi32(total[i], _mm512_madd_epi16(words[i], ones));
  }
#endif
  for (int i = 0; i < M * N; ++i) sums[i][0] = _mm512_cvtepi32_ps(total[i]);
}

// bit i: keys[i] > t, for W keys
inline uint32_t above(const int32_t* keys, int32_t t) {
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(t));
}
