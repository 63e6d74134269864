// AdamW with fp32 master weights in ONE pass over memory per tensor: decay, both moments, update, rounding to bf16.
// torch's fused AdamW wants fp32 gradients and leaves the master -> bf16 copy to the caller: two more passes (40 bytes moved per
// bf16 weight instead of 28). `rows` and `cols` update only the neurons that took part in a step, each with its own clock.
#include <cmath>

#include "simd.h"

namespace fallow {

struct AdamWHyper {
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
};

struct AdamWTensor {
  void* param;         // bf16 or fp32; with fp32 it is its own master
  float* master;       // fp32; ignored when param is fp32
  float* exp_avg;
  float* exp_avg_sq;
  const void* grad;    // bf16 or fp32
  int64_t numel;
  double step_size;    // lr / (1 - beta1^step)
  double bias2_sqrt;   // sqrt(1 - beta2^step)
  int32_t param_bf16;
  int32_t grad_bf16;
};

struct Scalars {
  float decay, weight1, beta2, weight2, eps, grad_scale;
  explicit Scalars(const AdamWHyper& h)
      : decay(float(1.0 - h.lr * h.weight_decay)), weight1(float(1.0 - h.beta1)), beta2(float(h.beta2)),
        weight2(float(1.0 - h.beta2)), eps(float(h.eps)), grad_scale(float(h.grad_scale)) {}
};

// The operations and their order are those of torch.optim.AdamW's CPU kernels, so that fp32 results agree to the last bits.
template <bool kFma>
FALLOW_INLINE void update(const Scalars& s, float step_size, float bias2_sqrt, float grad, float& weight, float& m, float& v) {
  const float g = grad * s.grad_scale;
  const float decayed = weight * s.decay;
  m = madd<kFma>(s.weight1, g - m, m);
  v = madd<kFma>(s.weight2 * g, g, v * s.beta2);
  const float denominator = __builtin_sqrtf(v) / bias2_sqrt + s.eps;
  weight = decayed + (-step_size * m) / denominator;
}

template <class P, class G>
struct Span {
  template <bool kFma>
  static FALLOW_INLINE void run(const AdamWTensor* t, const Scalars* s, float step_size, float bias2_sqrt, int64_t begin,
                                int64_t end) {
    P* __restrict param = static_cast<P*>(t->param) + begin;
    float* __restrict master = t->param_bf16 ? t->master + begin : nullptr;
    float* __restrict exp_avg = t->exp_avg + begin;
    float* __restrict exp_avg_sq = t->exp_avg_sq + begin;
    const G* __restrict grad = static_cast<const G*>(t->grad) + begin;
    const Scalars scalars = *s;
#pragma GCC ivdep
    for (int64_t i = 0; i < end - begin; ++i) {
      float weight;
      if constexpr (sizeof(P) == 2) weight = master[i];
      else weight = to_float(param[i]);
      float m = exp_avg[i], v = exp_avg_sq[i];
      update<kFma>(scalars, step_size, bias2_sqrt, to_float(grad[i]), weight, m, v);
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      if constexpr (sizeof(P) == 2) master[i] = weight;
      from_float(weight, &param[i]);
    }
  }
};

// One row of a matrix of which only some columns took part: columns with active[c] == 0 keep weight, moments and decay as they were.
template <class P, class G>
struct MaskedRow {
  template <bool kFma>
  static FALLOW_INLINE void run(const AdamWTensor* t, const Scalars* s, const float* step_size, const float* bias2_sqrt,
                                const int32_t* active, int64_t row, int64_t width) {
    const int64_t begin = row * width;
    P* __restrict param = static_cast<P*>(t->param) + begin;
    float* __restrict master = t->param_bf16 ? t->master + begin : nullptr;
    float* __restrict exp_avg = t->exp_avg + begin;
    float* __restrict exp_avg_sq = t->exp_avg_sq + begin;
    const G* __restrict grad = static_cast<const G*>(t->grad) + begin;
    const float* __restrict step_size_c = step_size;
    const float* __restrict bias2_sqrt_c = bias2_sqrt;
    const int32_t* __restrict active_c = active;
    const Scalars scalars = *s;
#pragma GCC ivdep
    for (int64_t c = 0; c < width; ++c) {
      float before;
      if constexpr (sizeof(P) == 2) before = master[c];
      else before = to_float(param[c]);
      float weight = before, m = exp_avg[c], v = exp_avg_sq[c];
      update<kFma>(scalars, step_size_c[c], bias2_sqrt_c[c], to_float(grad[c]), weight, m, v);
      const bool on = active_c[c] != 0;
      exp_avg[c] = on ? m : exp_avg[c];
      exp_avg_sq[c] = on ? v : exp_avg_sq[c];
      weight = on ? weight : before;
      if constexpr (sizeof(P) == 2) master[c] = weight;
      P rounded;
      from_float(weight, &rounded);
      param[c] = on ? rounded : param[c];
    }
  }
};

// What entries of different age share: tables over the age byte, and the stochastic rounding of bf16 state.
struct Aged {
  const uint8_t* age;         // one per entry
  const float* step_size;     // [256]: lr / (1 - beta1^t) times the warm-up ramp, t the entry's own step count
  const float* bias2_sqrt;    // [256]
  int64_t offset;             // number of the first entry in the unsharded parameter
  uint32_t salt;              // of this parameter and step
};

// 32 random bits of (entry, salt): the finaliser of MurmurHash3. Numbered by entry, so threads and shards do not change it.
FALLOW_INLINE uint32_t random_bits(uint32_t entry, uint32_t salt) {
  uint32_t x = entry * 0x9e3779b9u + salt;
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// bf16 by stochastic rounding: `noise` in [0, 65536) is added below the last kept bit. The mean is exact, which nearest rounding of
// 0.999 v is not: it gives v back for ever. Infinities and NaN pass through.
FALLOW_INLINE bf16 rounded_stochastically(float x, uint32_t noise) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return bf16{uint16_t((bits + (finite ? noise : 0u)) >> 16)};
}

// P parameter, G gradient, S moments; with bf16 moments a bf16 parameter has no master and is rounded stochastically too.
template <class P, class G, class S>
struct AgedSpan {
  template <bool kFma>
  static FALLOW_INLINE void run(const AdamWTensor* t, const Scalars* s, const Aged* a, int64_t begin, int64_t end) {
    constexpr bool kMaster = sizeof(P) == 2 && sizeof(S) == 4;
    P* __restrict param = static_cast<P*>(t->param) + begin;
    float* __restrict master = kMaster ? t->master + begin : nullptr;
    S* __restrict exp_avg = reinterpret_cast<S*>(t->exp_avg) + begin;
    S* __restrict exp_avg_sq = reinterpret_cast<S*>(t->exp_avg_sq) + begin;
    const G* __restrict grad = static_cast<const G*>(t->grad) + begin;
    const uint8_t* __restrict age = a->age + begin;
    const float* __restrict step_size = a->step_size;
    const float* __restrict bias2_sqrt = a->bias2_sqrt;
    const uint32_t first = uint32_t(a->offset + begin), salt = a->salt;
    const Scalars scalars = *s;
#pragma GCC ivdep
    for (int64_t i = 0; i < end - begin; ++i) {
      float weight;
      if constexpr (kMaster) weight = master[i];
      else weight = to_float(param[i]);
      float m = to_float(exp_avg[i]), v = to_float(exp_avg_sq[i]);
      const uint32_t cohort = age[i];
      update<kFma>(scalars, step_size[cohort], bias2_sqrt[cohort], to_float(grad[i]), weight, m, v);
      if constexpr (sizeof(S) == 2) {
        const uint32_t noise = random_bits(first + uint32_t(i), salt);
        exp_avg[i] = rounded_stochastically(m, noise & 0xffffu);
        exp_avg_sq[i] = rounded_stochastically(v, noise >> 16);
        if constexpr (sizeof(P) == 2) param[i] = rounded_stochastically(weight, random_bits(first + uint32_t(i), ~salt) & 0xffffu);
        else param[i] = weight;
      } else {
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        if constexpr (kMaster) master[i] = weight;
        from_float(weight, &param[i]);
      }
    }
  }
};

template <class S>
void aged_span(const AdamWTensor* t, const Scalars* s, const Aged* a, int64_t begin, int64_t end) {
  if (t->param_bf16) {
    if (t->grad_bf16) dispatch<AgedSpan<bf16, bf16, S>>(t, s, a, begin, end);
    else dispatch<AgedSpan<bf16, float, S>>(t, s, a, begin, end);
  } else {
    if (t->grad_bf16) dispatch<AgedSpan<float, bf16, S>>(t, s, a, begin, end);
    else dispatch<AgedSpan<float, float, S>>(t, s, a, begin, end);
  }
}

template <template <class, class> class Kernel, class... Args>
void by_dtype(const AdamWTensor* t, Args... args) {
  if (t->param_bf16) {
    if (t->grad_bf16) dispatch<Kernel<bf16, bf16>>(t, args...);
    else dispatch<Kernel<bf16, float>>(t, args...);
  } else {
    if (t->grad_bf16) dispatch<Kernel<float, bf16>>(t, args...);
    else dispatch<Kernel<float, float>>(t, args...);
  }
}

}  // namespace fallow

using namespace fallow;

// Every tensor of a parameter group, split over threads by chunks of the whole, so that one large embedding does not serialise.
FALLOW_API void fallow_adamw_dense(const AdamWTensor* tensors, int64_t n_tensors, const AdamWHyper* hyper, int n_threads) {
  constexpr int64_t kChunk = 1 << 15;
  const Scalars scalars(*hyper);
  std::vector<int64_t> first_chunk(size_t(n_tensors) + 1, 0);
  for (int64_t i = 0; i < n_tensors; ++i)
    first_chunk[size_t(i) + 1] = first_chunk[size_t(i)] + (tensors[i].numel + kChunk - 1) / kChunk;
  parallel(first_chunk.back(), n_threads, [&](int64_t begin, int64_t end) {
    int64_t i = std::upper_bound(first_chunk.begin(), first_chunk.end(), begin) - first_chunk.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first_chunk[size_t(i) + 1]) ++i;
      const AdamWTensor* t = &tensors[i];
      const int64_t start = (chunk - first_chunk[size_t(i)]) * kChunk;
      by_dtype<Span>(t, &scalars, float(t->step_size), float(t->bias2_sqrt), start, std::min(start + kChunk, t->numel));
    }
  });
}

// Rows index[0..kept) of a [rows, width] tensor took part: their clocks advance by one and give each row its bias correction.
FALLOW_API void fallow_adamw_rows(const AdamWTensor* t, int64_t width, const int64_t* index, int64_t kept, int32_t* clock,
                                  const AdamWHyper* hyper, int n_threads) {
  const Scalars scalars(*hyper);
  parallel(kept, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = index[k];
      const int32_t step = ++clock[row];
      const float step_size = float(hyper->lr / (1.0 - std::pow(hyper->beta1, step)));
      const float bias2_sqrt = float(std::sqrt(1.0 - std::pow(hyper->beta2, step)));
      by_dtype<Span>(t, &scalars, step_size, bias2_sqrt, row * width, (row + 1) * width);
    }
  });
}

// Columns index[0..kept) took part. All columns are read (a cache line holds 16 of them, so hardly one could be skipped).
FALLOW_API void fallow_adamw_cols(const AdamWTensor* t, int64_t rows, int64_t width, const int64_t* index, int64_t kept,
                                  int32_t* clock, const AdamWHyper* hyper, int n_threads) {
  const Scalars scalars(*hyper);
  std::vector<float> step_size(size_t(width), 0.0f), bias2_sqrt(size_t(width), 1.0f);
  std::vector<int32_t> active(size_t(width), 0);
  for (int64_t k = 0; k < kept; ++k) {
    const size_t c = size_t(index[k]);
    const int32_t step = ++clock[c];
    step_size[c] = float(hyper->lr / (1.0 - std::pow(hyper->beta1, step)));
    bias2_sqrt[c] = float(std::sqrt(1.0 - std::pow(hyper->beta2, step)));
    active[c] = 1;
  }
  const float *sizes = step_size.data(), *biases = bias2_sqrt.data();
  const int32_t* on = active.data();
  parallel(rows, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) by_dtype<MaskedRow>(t, &scalars, sizes, biases, on, row, width);
  });
}

// Every entry has a clock of its own, told by its age byte. `moments_bf16`: moments, and a bf16 parameter without master, are rounded
// stochastically.
FALLOW_API void fallow_adamw_aged(const AdamWTensor* t, const uint8_t* age, const float* step_size, const float* bias2_sqrt,
                                  int64_t offset, uint32_t salt, int moments_bf16, const AdamWHyper* hyper, int n_threads) {
  constexpr int64_t kChunk = 1 << 15;
  const Scalars scalars(*hyper);
  const Aged aged{age, step_size, bias2_sqrt, offset, salt};
  parallel((t->numel + kChunk - 1) / kChunk, n_threads, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, last = std::min(first + kChunk, t->numel);
      if (moments_bf16) aged_span<bf16>(t, &scalars, &aged, first, last);
      else aged_span<float>(t, &scalars, &aged, first, last);
    }
  });
}
