// Weights rounded to 2 or 4 bits in groups of a row that share a scale, written back as numbers: what a quantized predictor's copy
// holds, in one pass, for training, which rounds every gate and up projection at every step. pack.py says it in PyTorch.
// Traffic: the matrix read and written once.
#include "simd.h"

namespace fallow {

template <class T>
struct RoundGroup {
  template <bool kFma>
  static FALLOW_INLINE void run(const T* in_, T* out_, int64_t n, float half) {
    const T* __restrict in = in_;
    T* __restrict out = out_;
    float top[16];
    for (int j = 0; j < 16; ++j) top[j] = 0.0f;
    const int64_t whole = n - n % 16;
    for (int64_t i = 0; i < whole; i += 16)
      for (int j = 0; j < 16; ++j) {
        const float x = to_float(in[i + j]), size = x < 0.0f ? -x : x;
        top[j] = size > top[j] ? size : top[j];
      }
    float largest = 0.0f;
    for (int j = 0; j < 16; ++j) largest = top[j] > largest ? top[j] : largest;
    for (int64_t i = whole; i < n; ++i) {
      const float x = to_float(in[i]), size = x < 0.0f ? -x : x;
      largest = size > largest ? size : largest;
    }
    bf16 stored;
    from_float(largest / half, &stored);
    const float scale = to_float(stored), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to a whole number, ties to even
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      float code = (to_float(in[i]) * inverse + half + kShift) - kShift;
      code = code < 0.0f ? 0.0f : code > 2.0f * half ? 2.0f * half : code;
      from_float((code - half) * scale, &out[i]);
    }
  }
};

template <class T>
void round_groups(const T* in, T* out, int64_t rows, int64_t cols, int64_t group, int bits, int n_threads) {
  const float half = float((1 << bits) - 1) / 2.0f;
  parallel(rows, n_threads, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < cols; c += group)
        dispatch<RoundGroup<T>>(in + r * cols + c, out + r * cols + c, std::min(group, cols - c), half);
  });
}

}  // namespace fallow

// in, out [rows, cols] contiguous, both bf16 or both fp32.
FALLOW_API void fallow_round_groups(const void* in, void* out, int is_bf16, int64_t rows, int64_t cols, int64_t group, int bits,
                                    int n_threads) {
  using namespace fallow;
  if (is_bf16)
    round_groups(static_cast<const bf16*>(in), static_cast<bf16*>(out), rows, cols, group, bits, n_threads);
  else
    round_groups(static_cast<const float*>(in), static_cast<float*>(out), rows, cols, group, bits, n_threads);
}
