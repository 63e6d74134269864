// Lanes of bank_kernels.h in plain C++: loops of 8 that compilers turn into what the CPU has (SSE2, NEON).
constexpr int W = 8;
struct F {
  float v[W];
};
struct I {
  int32_t v[W];
};

template <class Vector, class Each>
inline Vector lanes(const Each& each) {
  Vector out;
  for (int i = 0; i < W; ++i) out.v[i] = each(i);
  return out;
}

inline F set1(float a) {
  return lanes<F>([&](int) { return a; });
}
inline F zero() { return set1(0.0f); }
inline F load(const float* p) {
  return lanes<F>([&](int i) { return p[i]; });
}
inline void store(float* p, const F& a) {
  for (int i = 0; i < W; ++i) p[i] = a.v[i];
}
inline F add(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F mul(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F fma(const F& a, const F& b, const F& c) {
  return lanes<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// the sums across lanes of four
inline void sum4(const F* a, float* out) {
  for (int i = 0; i < 4; ++i) {
    const float* v = a[i].v;
    out[i] = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
  }
}

inline void halves(const bf16* p, F& even, F& odd) {
  even = lanes<F>([&](int i) { return to_float(p[2 * i]); });
  odd = lanes<F>([&](int i) { return to_float(p[2 * i + 1]); });
}
inline F widen(const bf16* p) {
  return lanes<F>([&](int i) { return to_float(p[i]); });
}
inline F from8(const int8_t* p) {
  return lanes<F>([&](int i) { return float(p[i]); });
}

inline I izero() {
  return lanes<I>([](int) { return 0; });
}
inline F to_floats(const I& a) {
  return lanes<F>([&](int i) { return float(a.v[i]); });
}
// a + the sums of neighbours of w * x, 2 W of them
inline I dot16(const int8_t* w, const int16_t* x, const I& a) {
  return lanes<I>([&](int i) { return a.v[i] + w[2 * i] * x[2 * i] + w[2 * i + 1] * x[2 * i + 1]; });
}

// sums[m * N + n][half] = a group of 16 channels' codes, at codes[m], times the bytes of token n; `stride` bytes between tokens.
template <int kBits, int M, int N>
inline void code_sums(const uint8_t* const* codes, int64_t group, const int8_t* x, int64_t stride, F (*sums)[16 / W]) {
  constexpr int kPer = 8 / kBits;
  int32_t total[M * N][16] = {};
  for (int i = 0; i < M * N; ++i)
    for (int64_t at = 0; at < group; at += 4) {
      const uint8_t* word = codes[i / N] + at / (4 * kPer) * 64;
      const int8_t* four = x + i % N * stride + at;
      const int shift = int(at / 4 % kPer) * kBits;
      for (int lane = 0; lane < 16; ++lane)
        for (int b = 0; b < 4; ++b) total[i][lane] += ((word[4 * lane + b] >> shift) & ((1 << kBits) - 1)) * four[b];
    }
  for (int i = 0; i < M * N; ++i)
    for (int half = 0; half < 2; ++half) sums[i][half] = lanes<F>([&](int k) { return float(total[i][W * half + k]); });
}

// bit i: keys[i] > t, for W keys
inline uint32_t above(const int32_t* keys, int32_t t) {
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= uint32_t(keys[i] > t) << i;
  return bits;
}
