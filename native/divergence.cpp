// Kullback-Leibler divergence of one distribution over a large vocabulary from another, with its gradient, row by row: both rows
// stay in the L2 cache while their normalisers, the sum and the gradient are formed in fp32 registers.
// Traffic: both read once, the gradient written once.
#include "log_sum_exp.h"

namespace fallow {

template <class T>
struct Divergence {
  // *total = sum p_t (log p_t - log p_s); out = p_s - p_t, the gradient to the student's logits
  template <bool kFma>
  static FALLOW_INLINE void run(const T* student_in, const T* teacher_in, int64_t width, float student_lse, float teacher_lse, T* out_in,
                                float* total) {
    const T* __restrict student = student_in;
    const T* __restrict teacher = teacher_in;
    T* __restrict out = out_in;
    float sum[kLanes];
    for (int j = 0; j < kLanes; ++j) sum[j] = 0.0f;
    const int64_t whole = width - width % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; ++j) {
        const float s = to_float(student[i + j]) - student_lse, t = to_float(teacher[i + j]) - teacher_lse;
        const float p = exp_nonpositive<kFma>(t);
        sum[j] += p * (t - s);
        from_float(exp_nonpositive<kFma>(s) - p, &out[i + j]);
      }
    float all = 0.0f;
    for (int j = 0; j < kLanes; ++j) all += sum[j];
    for (int64_t i = whole; i < width; ++i) {
      const float s = to_float(student[i]) - student_lse, t = to_float(teacher[i]) - teacher_lse;
      const float p = exp_nonpositive<kFma>(t);
      all += p * (t - s);
      from_float(exp_nonpositive<kFma>(s) - p, &out[i]);
    }
    *total = all;
  }
};

template <class T>
void divergence(const T* student, const T* teacher, int64_t rows, int64_t width, T* gradient, float* per_row, int n_threads) {
  parallel(rows, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T *s = student + r * width, *t = teacher + r * width;
      float s_lse, t_lse;
      dispatch<LogSumExp<T>>(s, width, &s_lse);
      dispatch<LogSumExp<T>>(t, width, &t_lse);
      dispatch<Divergence<T>>(s, t, width, s_lse, t_lse, gradient + r * width, per_row + r);
    }
  });
}

}  // namespace fallow

using namespace fallow;

// student, teacher, gradient [rows, width] contiguous, all bf16 or all fp32; per_row fp32 [rows].
FALLOW_API void fallow_divergence(const void* student, const void* teacher, int is_bf16, int64_t rows, int64_t width, void* gradient,
                                  float* per_row, int n_threads) {
  if (is_bf16)
    divergence(static_cast<const bf16*>(student), static_cast<const bf16*>(teacher), rows, width, static_cast<bf16*>(gradient), per_row,
               n_threads);
  else
    divergence(static_cast<const float*>(student), static_cast<const float*>(teacher), rows, width, static_cast<float*>(gradient),
               per_row, n_threads);
}
