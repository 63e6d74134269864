// y = x W^T + b for a few rows of x: reading W once is all there is to do. oneDNN's bf16 product of one row reads at 50 to 70 % of
// what memory gives (5.2 to 6.7 of 10 GB/s, all with the same neighbours), because it blocks for reuse that one row does not have.
// Here four rows of W go by side by side and the next four are prefetched: 8.5 to 11 of 10 GB/s.
//
// W may also lie input by input, as the down projection of an FFN does whose channels are read one by one: then its rows are summed,
// by chunks of inputs with a sum each. Chunks do not depend on the number of threads, so neither do the bits of y.
#include "lines.h"

namespace fallow {
namespace {

constexpr int64_t kSide = 4;              // rows of W side by side
constexpr int64_t kPieceBytes = 1 << 17;  // what a thread takes at a time
constexpr int64_t kAloneBytes = 1 << 17;  // below, a second thread costs more than it saves
constexpr int64_t kMostSums = 16;         // chunks of inputs

// One linear. By outputs: w [outputs, width]. By inputs: w [width, outputs].
struct Linear {
  const void* w;
  const void* bias;  // [outputs] or null
  void* y;           // [tokens, outputs]
  int64_t outputs, stride;  // entries from one row of w to the next
  bool by_inputs;
  int64_t chunk, pieces;  // outputs or inputs of a piece, and how many there are
  float* sums;            // by inputs: [pieces, tokens, outputs], in the order of `spread`
};

struct Input {
  const float *spread, *plain;  // [tokens, width]
  int64_t tokens, width;
};

// kRows consecutive outputs of one token.
template <bool kFma, int kRows, class T>
FALLOW_INLINE void dots(const T* w, int64_t stride, const float* x, int64_t width, bool prefetch, float* out) {
  Lanes sum[kRows] = {};
  int64_t i = 0;
  for (; i + kLine<T> <= width; i += kLine<T>) {
    for (int r = 0; r < kRows; ++r) {
      const T* at = w + r * stride + i;
      if (prefetch) __builtin_prefetch(at + kRows * stride);
      Lanes first, second;
      split(at, &first, &second);
      sum[r] += dot_line<T>(first, second, x + i);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    out[r] = total(sum[r]);
    for (int64_t k = i; k < width; ++k) out[r] = madd<kFma>(to_float(w[r * stride + k]), x[k], out[r]);
  }
}

// sum += x[r] w[r] over kRows consecutive inputs of one token.
template <bool kFma, int kRows, class T>
FALLOW_INLINE void add_rows(const T* w, int64_t stride, const float* x, int64_t outputs, bool prefetch, float* sum) {
  int64_t o = 0;
  for (; o + kLine<T> <= outputs; o += kLine<T>) {
    Lanes first_sum, second_sum;
    load_two<T>(sum + o, &first_sum, &second_sum);
    for (int r = 0; r < kRows; ++r) {
      const T* at = w + r * stride + o;
      if (prefetch) __builtin_prefetch(at + kRows * stride);
      Lanes first, second;
      split(at, &first, &second);
      first_sum += first * x[r];
      if constexpr (kLine<T> > 16) second_sum += second * x[r];
    }
    store_two<T>(first_sum, second_sum, sum + o);
  }
  for (; o < outputs; ++o)
    for (int r = 0; r < kRows; ++r) sum[o] = madd<kFma>(to_float(w[r * stride + o]), x[r], sum[o]);
}

template <class T>
struct ByOutputs {
  template <bool kFma>
  FALLOW_INLINE static void run(const Linear* l, const Input* x, int64_t piece) {
    const T *w = static_cast<const T*>(l->w), *bias = static_cast<const T*>(l->bias);
    T* y = static_cast<T*>(l->y);
    const int64_t end = std::min(l->outputs, (piece + 1) * l->chunk), width = x->width, stride = l->stride;
    for (int64_t o = piece * l->chunk; o < end; o += kSide) {
      const int64_t side = std::min(kSide, end - o);
      for (int64_t t = 0; t < x->tokens; ++t) {
        float out[kSide];
        const float* xt = x->spread + t * width;
        if (side == kSide) dots<kFma, kSide>(w + o * stride, stride, xt, width, t == 0, out);
        else
          for (int64_t r = 0; r < side; ++r) dots<kFma, 1>(w + (o + r) * stride, stride, xt, width, false, out + r);
        for (int64_t r = 0; r < side; ++r)
          from_float(bias ? out[r] + to_float(bias[o + r]) : out[r], y + t * l->outputs + o + r);
      }
    }
  }
};

template <class T>
struct ByInputs {
  template <bool kFma>
  FALLOW_INLINE static void run(const Linear* l, const Input* x, int64_t piece) {
    const T* w = static_cast<const T*>(l->w);
    const int64_t end = std::min(x->width, (piece + 1) * l->chunk), outputs = l->outputs, stride = l->stride;
    float* sums = l->sums + piece * x->tokens * outputs;
    for (int64_t i = piece * l->chunk; i < end; i += kSide) {
      const int64_t side = std::min(kSide, end - i);
      for (int64_t t = 0; t < x->tokens; ++t) {
        const float* xt = x->plain + t * x->width + i;
        float* sum = sums + t * outputs;
        if (side == kSide) add_rows<kFma, kSide>(w + i * stride, stride, xt, outputs, t == 0, sum);
        else
          for (int64_t r = 0; r < side; ++r) add_rows<kFma, 1>(w + (i + r) * stride, stride, xt + r, outputs, false, sum);
      }
    }
  }
};

// y from the sums of all pieces.
template <class T>
struct Collect {
  template <bool kFma>
  FALLOW_INLINE static void run(const Linear* l, int64_t tokens) {
    const int64_t n = tokens * l->outputs;
    float* sum = l->sums;
    for (int64_t p = 1; p < l->pieces; ++p)
      for (int64_t i = 0; i < n; ++i) sum[i] += sum[p * n + i];
    const T* bias = static_cast<const T*>(l->bias);
    for (int64_t t = 0; t < tokens; ++t) {
      T* y = static_cast<T*>(l->y) + t * l->outputs;
      gather(sum + t * l->outputs, l->outputs, y, [&](int64_t o, float s) { return bias ? s + to_float(bias[o]) : s; });
    }
  }
};

template <class T>
void linears(std::vector<Linear>& all, const T* x, int64_t tokens, int64_t width, int n_threads) {
  std::vector<float> spread_x(size_t(tokens * width)), plain_x(size_t(tokens * width)), sums;
  for (int64_t t = 0; t < tokens; ++t) spread(x + t * width, width, spread_x.data() + t * width);
  for (size_t i = 0; i < plain_x.size(); ++i) plain_x[i] = to_float(x[i]);
  const Input input{spread_x.data(), plain_x.data(), tokens, width};
  int64_t pieces = 0, bytes = 0, room = 0;
  for (Linear& l : all) {
    const int64_t rows = l.by_inputs ? width : l.outputs, row_bytes = (l.by_inputs ? l.outputs : width) * int64_t(sizeof(T));
    l.chunk = std::max(kSide, kPieceBytes / std::max<int64_t>(1, row_bytes) / kSide * kSide);
    if (l.by_inputs) l.chunk = std::max(l.chunk, (rows / kMostSums + kSide) / kSide * kSide);
    l.pieces = std::max<int64_t>(1, (rows + l.chunk - 1) / l.chunk);
    pieces += l.pieces, bytes += rows * row_bytes;
    if (l.by_inputs) room += l.pieces * tokens * l.outputs;
  }
  sums.resize(size_t(room));
  float* next = sums.data();
  for (Linear& l : all)
    if (l.by_inputs) l.sums = next, next += l.pieces * tokens * l.outputs;
  share_out(pieces, bytes < kAloneBytes ? 1 : n_threads, [&](int64_t piece) {
    for (const Linear& l : all) {
      if (piece < l.pieces)
        return l.by_inputs ? dispatch<ByInputs<T>>(&l, &input, piece) : dispatch<ByOutputs<T>>(&l, &input, piece);
      piece -= l.pieces;
    }
  });
  for (const Linear& l : all)
    if (l.by_inputs) dispatch<Collect<T>>(&l, tokens);
}

}  // namespace
}  // namespace fallow

using namespace fallow;

// `n` linears of the same x [tokens, width]; table: per linear the addresses of w, bias (or 0) and y, the number of outputs,
// the entries from one row of w to the next, and whether w's rows are inputs.
FALLOW_API void fallow_linears_of_rows(const int64_t* table, int64_t n, const void* x, int64_t tokens, int64_t width, int is_bf16,
                                  int n_threads) {
  std::vector<Linear> all;
  for (const int64_t* at = table; at < table + 6 * n; at += 6)
    all.push_back({reinterpret_cast<const void*>(at[0]), reinterpret_cast<const void*>(at[1]), reinterpret_cast<void*>(at[2]), at[3],
                   at[4], at[5] != 0, 0, 0, nullptr});
  if (is_bf16) linears(all, static_cast<const bf16*>(x), tokens, width, n_threads);
  else linears(all, static_cast<const float*>(x), tokens, width, n_threads);
}
