// What an FFN of experts does beside its GEMMs: sorting tokens by expert, the hidden layer in both directions, and the sum over a
// token's experts. Each is one pass over memory in fp32 registers, rounded once. The obvious alternative, index_add_ of each expert's
// rows and one tensor operation per factor, reads and writes the [T*K, D] rows K times and the [T*K, C] ones seven times.
// Cost, in elements: hidden 3 T K C forwards and 6 T K C backwards, combine T K D + T D.
#include <cmath>

#include "activation.h"

namespace fallow {

constexpr int kBlock = 64;  // lanes of a partial sum: four AVX-512 registers

// For rows visited in no order a CPU could foresee (combine: 2.3 -> 2.0 ms for 8,192 rows of 768 bf16).
FALLOW_INLINE void prefetch(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(row) + at);
}

// h = a(gate) * up, or a(up) where there is no gate.
template <class T, class Act>
struct Hidden {
  template <bool kFma>
  static FALLOW_INLINE void run(const T* gate_in, const T* up_in, T* h_in, int64_t n) {
    const T* __restrict gate = gate_in;
    const T* __restrict up = up_in;
    T* __restrict h = h_in;
    if (!gate) {
      for (int64_t i = 0; i < n; ++i) from_float(Act::template value<kFma>(to_float(up[i])), &h[i]);
      return;
    }
    for (int64_t i = 0; i < n; ++i) from_float(Act::template value<kFma>(to_float(gate[i])) * to_float(up[i]), &h[i]);
  }
};

// One row. In: gate, up, dh. Out: h, dgate, dup (which may be dh), and the sum of dh * h.
template <class T, class Act>
struct HiddenBackward {
  template <bool kFma>
  static FALLOW_INLINE float one(const T* gate, const T* up, T* dh_dup, T* h, T* dgate, int64_t i) {
    const float dh = to_float(dh_dup[i]);
    float a;
    float hidden;
    if (gate) {
      const float slope = Act::template slope<kFma>(to_float(gate[i]), &a), u = to_float(up[i]);
      hidden = a * u;
      from_float(dh * u * slope, &dgate[i]);
      from_float(dh * a, &dh_dup[i]);
    } else {
      const float slope = Act::template slope<kFma>(to_float(up[i]), &hidden);
      from_float(dh * slope, &dh_dup[i]);
    }
    from_float(hidden, &h[i]);
    return dh * hidden;
  }
  template <bool kFma, bool kGated>
  static FALLOW_INLINE float row(const T* gate_in, const T* up_in, T* dh_in, T* h_in, T* dgate_in, int64_t n) {
    const T* __restrict gate = kGated ? gate_in : nullptr;
    const T* __restrict up = up_in;
    T* __restrict dh = dh_in;
    T* __restrict h = h_in;
    T* __restrict dgate = dgate_in;
    float sum[kBlock] = {};
    const int64_t whole = n - n % kBlock;
    for (int64_t i = 0; i < whole; i += kBlock)
      for (int j = 0; j < kBlock; ++j) sum[j] += one<kFma>(gate, up, dh, h, dgate, i + j);
    float total = 0.0f;
    for (int64_t i = whole; i < n; ++i) total += one<kFma>(gate, up, dh, h, dgate, i);
    for (int width = kBlock / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) sum[j] += sum[j + width];
    return total + sum[0];
  }
  template <bool kFma>
  static FALLOW_INLINE void run(const T* gate, const T* up, T* dh, T* h, T* dgate, float* dot, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * width;
      dot[r] = gate ? row<kFma, true>(gate + at, up + at, dh + at, h + at, dgate + at, width)
                    : row<kFma, false>(nullptr, up + at, dh + at, h + at, nullptr, width);
    }
  }
};

// out[t] = bias + the sum over k of rows[slot[t, k]].
template <class T>
struct Combine {
  template <bool kFma>
  static FALLOW_INLINE void run(T* out_in, const T* rows, const int64_t* slot, const T* bias, int64_t tokens, int64_t chosen,
                                int64_t width) {
    for (int64_t t = 0; t < tokens; ++t) {
      T* __restrict out = out_in + t * width;
      const int64_t* of = slot + t * chosen;
      if (t + 1 < tokens)
        for (int64_t k = chosen; k < 2 * chosen; ++k) prefetch(rows + of[k] * width, width * int64_t(sizeof(T)));
      for (int64_t i = 0; i < width; i += kBlock) {
        const int64_t n = std::min<int64_t>(kBlock, width - i);
        float sum[kBlock] = {};
        if (n == kBlock) {
          if (bias)
            for (int j = 0; j < kBlock; ++j) sum[j] = to_float(bias[i + j]);
          for (int64_t k = 0; k < chosen; ++k) {
            const T* __restrict row = rows + of[k] * width + i;
            for (int j = 0; j < kBlock; ++j) sum[j] += to_float(row[j]);
          }
          for (int j = 0; j < kBlock; ++j) from_float(sum[j], &out[i + j]);
          continue;
        }
        for (int64_t j = 0; j < n; ++j) {
          float total = bias ? to_float(bias[i + j]) : 0.0f;
          for (int64_t k = 0; k < chosen; ++k) total += to_float(rows[of[k] * width + i + j]);
          from_float(total, &out[i + j]);
        }
      }
    }
  }
};

template <class T, class Act>
void hidden(const void* gate, const void* up, void* h, int64_t n, int n_threads) {
  parallel(n, n_threads, [=](int64_t begin, int64_t end) {
    const T* g = static_cast<const T*>(gate);
    dispatch<Hidden<T, Act>>(g ? g + begin : g, static_cast<const T*>(up) + begin, static_cast<T*>(h) + begin, end - begin);
  });
}

template <class T, class Act>
void hidden_backward(const void* gate, const void* up, void* dh, void* h, void* dgate, float* dot, int64_t rows, int64_t width,
                     int n_threads) {
  parallel(rows, n_threads, [=](int64_t begin, int64_t end) {
    const int64_t at = begin * width;
    const T* g = static_cast<const T*>(gate);
    T* dg = static_cast<T*>(dgate);
    dispatch<HiddenBackward<T, Act>>(g ? g + at : g, static_cast<const T*>(up) + at, static_cast<T*>(dh) + at,
                                     static_cast<T*>(h) + at, g ? dg + at : dg, dot + begin, end - begin, width);
  });
}

template <class T>
void combine(void* out, const void* rows, const int64_t* slot, const void* bias, int64_t tokens, int64_t chosen, int64_t width,
             int n_threads) {
  parallel(tokens, n_threads, [=](int64_t begin, int64_t end) {
    dispatch<Combine<T>>(static_cast<T*>(out) + begin * width, static_cast<const T*>(rows), slot + begin * chosen,
                         static_cast<const T*>(bias), end - begin, chosen, width);
  });
}

// Numbered as in fallow/ops/activation.py: ACTIVATIONS.
#define FALLOW_BY_ACT(T, call)          \
  switch (act) {                        \
    case 0: return call<T, Silu>;       \
    case 1: return call<T, Gelu>;       \
    case 2: return call<T, GeluTanh>;   \
    case 3: return call<T, Relu>;       \
    default: return call<T, Relu2>;     \
  }
template <class T>
auto hidden_for(int act) -> decltype(&hidden<T, Relu>) {
  FALLOW_BY_ACT(T, hidden)
}
template <class T>
auto hidden_backward_for(int act) -> decltype(&hidden_backward<T, Relu>) {
  FALLOW_BY_ACT(T, hidden_backward)
}
#undef FALLOW_BY_ACT

}  // namespace fallow

using namespace fallow;

// Sort the tokens of choice [tokens, chosen] by expert, keeping their order within an expert. Written: count [experts]; start
// [experts + 1], where each expert's rows begin, multiples of `pad` apart; token, the token of each row, unset between an expert's last
// row and the next expert's first; slot [tokens, chosen], the row of each choice. An expert outside [0, experts) makes
// start[experts] = -1 and nothing else is to be used.
FALLOW_API void fallow_expert_sort(const int64_t* choice, int64_t tokens, int64_t chosen, int64_t experts, int64_t pad,
                                   int64_t* start, int64_t* count, int64_t* token, int64_t* slot) {
  std::fill(count, count + experts, int64_t(0));
  for (int64_t i = 0; i < tokens * chosen; ++i) {
    if (choice[i] < 0 || choice[i] >= experts) {
      start[experts] = -1;
      return;
    }
    ++count[choice[i]];
  }
  start[0] = 0;
  for (int64_t e = 0; e < experts; ++e) start[e + 1] = start[e] + (count[e] + pad - 1) / pad * pad;
  std::vector<int64_t> next(start, start + experts);
  for (int64_t t = 0, i = 0; t < tokens; ++t)
    for (int64_t k = 0; k < chosen; ++k, ++i) {
      slot[i] = next[size_t(choice[i])]++;
      token[slot[i]] = t;
    }
}

// out [rows, .] = in[token[r]] for the first `count` rows, zero for those after; rows of `row_bytes` bytes.
FALLOW_API void fallow_expert_gather(char* out, const char* in, const int64_t* token, int64_t count, int64_t rows, int64_t row_bytes,
                                     int n_threads) {
  fallow::parallel(rows, n_threads, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (r < count) std::memcpy(out + r * row_bytes, in + token[r] * row_bytes, size_t(row_bytes));
      else std::memset(out + r * row_bytes, 0, size_t(row_bytes));
    }
  });
}

// h [n] = a(gate) * up, or a(up) with gate null.
FALLOW_API void fallow_expert_hidden(const void* gate, const void* up, void* h, int64_t n, int act, int is_bf16, int n_threads) {
  (is_bf16 ? hidden_for<bf16>(act) : hidden_for<float>(act))(gate, up, h, n, n_threads);
}

// Rows of `width` channels. dh is overwritten by the gradient of `up`; h and dgate (unless gate is null) are written, and
// dot [rows] = the sum of dh * h in fp32.
FALLOW_API void fallow_expert_hidden_backward(const void* gate, const void* up, void* dh, void* h, void* dgate, float* dot,
                                              int64_t rows, int64_t width, int act, int is_bf16, int n_threads) {
  (is_bf16 ? hidden_backward_for<bf16>(act) : hidden_backward_for<float>(act))(gate, up, dh, h, dgate, dot, rows, width, n_threads);
}

// out [tokens, width] = bias (may be null) + the sum over a token's `chosen` slots of rows [., width], in fp32 and in that order.
FALLOW_API void fallow_expert_combine(void* out, const void* rows, const int64_t* slot, const void* bias, int64_t tokens,
                                      int64_t chosen, int64_t width, int is_bf16, int n_threads) {
  (is_bf16 ? combine<bf16> : combine<float>)(out, rows, slot, bias, tokens, chosen, width, n_threads);
}
