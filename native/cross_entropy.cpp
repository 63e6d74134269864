// Cross entropy over a large vocabulary, one row of logits at a time: the row (100 KB in bf16 at 49k words) stays in the L2 cache
// while its maximum, its sum of exponentials and later its gradient are formed in fp32 registers. No fp32 copy of the logits.
// Traffic: logits read once forwards; read once and gradient written once backwards.
#include "log_sum_exp.h"

namespace fallow {

template <class T>
struct SoftmaxGrad {
  template <bool kFma>
  static FALLOW_INLINE void run(const T* row_in, T* out_in, int64_t width, float lse, float scale) {
    const T* __restrict row = row_in;
    T* __restrict out = out_in;
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) from_float(exp_nonpositive<kFma>(to_float(row[i]) - lse) * scale, &out[i]);
  }
};

template <class T>
void forward(const T* logits, int64_t rows, int64_t width, int64_t stride, const int64_t* labels, int64_t ignore, float* lse,
             float* loss, int n_threads) {
  parallel(rows, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      lse[r] = loss[r] = 0.0f;
      if (labels[r] == ignore) continue;
      const T* row = logits + r * stride;
      dispatch<LogSumExp<T>>(row, width, &lse[r]);
      loss[r] = lse[r] - to_float(row[labels[r]]);
    }
  });
}

template <class T>
void backward(const T* logits, int64_t rows, int64_t width, int64_t stride, const int64_t* labels, int64_t ignore,
              const float* lse, float scale, T* out, int n_threads) {
  parallel(rows, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* to = out + r * width;
      if (labels[r] == ignore) {
        std::memset(static_cast<void*>(to), 0, size_t(width) * sizeof(T));
        continue;
      }
      const T* row = logits + r * stride;
      dispatch<SoftmaxGrad<T>>(row, to, width, lse[r], scale);
      // recomputed for the one label, so that p - 1 is rounded once and not from an already rounded p
      from_float((std::exp(to_float(row[labels[r]]) - lse[r]) - 1.0f) * scale, &to[labels[r]]);
    }
  });
}

}  // namespace fallow

using namespace fallow;

// logits [rows, width] with row stride `stride`; labels int64 [rows] in [0, width) or `ignore`; lse, loss fp32 [rows] written.
FALLOW_API void fallow_cross_entropy_forward(const void* logits, int is_bf16, int64_t rows, int64_t width, int64_t stride,
                                             const int64_t* labels, int64_t ignore, float* lse, float* loss, int n_threads) {
  if (is_bf16) forward(static_cast<const bf16*>(logits), rows, width, stride, labels, ignore, lse, loss, n_threads);
  else forward(static_cast<const float*>(logits), rows, width, stride, labels, ignore, lse, loss, n_threads);
}

// out [rows, width] contiguous = scale * (softmax - onehot); zero where the label is `ignore`.
FALLOW_API void fallow_cross_entropy_backward(const void* logits, int is_bf16, int64_t rows, int64_t width, int64_t stride,
                                              const int64_t* labels, int64_t ignore, const float* lse, float scale, void* out,
                                              int n_threads) {
  if (is_bf16)
    backward(static_cast<const bf16*>(logits), rows, width, stride, labels, ignore, lse, scale, static_cast<bf16*>(out), n_threads);
  else
    backward(static_cast<const float*>(logits), rows, width, stride, labels, ignore, lse, scale, static_cast<float*>(out), n_threads);
}
