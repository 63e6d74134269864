// y = x W^T + b for a few rows of x: reading W once is all there is to do. oneDNN's bf16 product of one row reads at 50 to 70 % of
// what memory gives (5.2 to 6.7 of 10 GB/s, all with the same neighbours), because it blocks for reuse that one row does not have.
// Here four rows of W go by side by side and the next four are prefetched: 8.5 to 11 of 10 GB/s.
#include "lines.h"

namespace fallow {
namespace {

constexpr int64_t kSide = 4;                 // rows of W side by side
constexpr int64_t kPieceBytes = 1 << 17;     // what a thread takes at a time
constexpr int64_t kAloneBytes = 1 << 17;     // below, a second thread costs more than it saves

struct Rows {
  const void* w;     // [outputs, width]
  const void* bias;  // [outputs] or null
  void* y;           // [tokens, outputs]
  int64_t outputs;
};

// kRows consecutive outputs of one token.
template <bool kFma, int kRows, class T>
FALLOW_INLINE void dots(const T* w, const float* x, int64_t width, bool prefetch, float* out) {
  Lanes sum[kRows] = {};
  int64_t i = 0;
  for (; i + kLine<T> <= width; i += kLine<T>) {
    for (int r = 0; r < kRows; ++r) {
      const T* at = w + r * width + i;
      if (prefetch) __builtin_prefetch(at + kRows * width);
      Lanes first, second;
      split(at, &first, &second);
      sum[r] += dot_line<T>(first, second, x + i);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    out[r] = total(sum[r]);
    for (int64_t k = i; k < width; ++k) out[r] = madd<kFma>(to_float(w[r * width + k]), x[k], out[r]);
  }
}

template <class T>
struct Kernel {
  // Outputs [begin, end) of every token.
  template <bool kFma>
  FALLOW_INLINE static void run(const Rows* rows, const float* x, int64_t tokens, int64_t width, int64_t begin, int64_t end) {
    const T* w = static_cast<const T*>(rows->w);
    const T* bias = static_cast<const T*>(rows->bias);
    T* y = static_cast<T*>(rows->y);
    for (int64_t o = begin; o < end; o += kSide) {
      const int64_t side = std::min(kSide, end - o);
      for (int64_t t = 0; t < tokens; ++t) {
        float out[kSide];
        if (side == kSide) dots<kFma, kSide>(w + o * width, x + t * width, width, t == 0, out);
        else
          for (int64_t r = 0; r < side; ++r) dots<kFma, 1>(w + (o + r) * width, x + t * width, width, false, out + r);
        for (int64_t r = 0; r < side; ++r)
          from_float(bias ? out[r] + to_float(bias[o + r]) : out[r], y + t * rows->outputs + o + r);
      }
    }
  }
};

template <class T>
void linears(const Rows* rows, int64_t n, const T* x, int64_t tokens, int64_t width, int n_threads) {
  std::vector<float> wide(size_t(tokens * width));
  for (int64_t t = 0; t < tokens; ++t) spread(x + t * width, width, wide.data() + t * width);
  const int64_t row_bytes = std::max<int64_t>(1, width * int64_t(sizeof(T)));
  const int64_t chunk = std::max(kSide, kPieceBytes / row_bytes / kSide * kSide);
  int64_t pieces = 0, outputs = 0;
  for (int64_t i = 0; i < n; ++i) pieces += (rows[i].outputs + chunk - 1) / chunk, outputs += rows[i].outputs;
  const auto work = [&](int64_t piece) {
    for (const Rows* r = rows; r < rows + n; ++r) {
      const int64_t here = (r->outputs + chunk - 1) / chunk;
      if (piece < here) {
        const int64_t begin = piece * chunk;
        return dispatch<Kernel<T>>(r, static_cast<const float*>(wide.data()), tokens, width, begin,
                                   std::min(begin + chunk, r->outputs));
      }
      piece -= here;
    }
  };
  share_out(pieces, outputs * row_bytes < kAloneBytes ? 1 : n_threads, work);
}

}  // namespace
}  // namespace fallow

using namespace fallow;

// `n` linears of the same x [tokens, width]; rows: per linear the addresses of w, bias (or 0) and y, and the number of outputs.
FALLOW_API void fallow_row_linear(const int64_t* table, int64_t n, const void* x, int64_t tokens, int64_t width, int is_bf16,
                                  int n_threads) {
  std::vector<Rows> rows;
  for (int64_t i = 0; i < n; ++i)
    rows.push_back({reinterpret_cast<const void*>(table[4 * i]), reinterpret_cast<const void*>(table[4 * i + 1]),
                    reinterpret_cast<void*>(table[4 * i + 2]), table[4 * i + 3]});
  if (is_bf16) linears(rows.data(), n, static_cast<const bf16*>(x), tokens, width, n_threads);
  else linears(rows.data(), n, static_cast<const float*>(x), tokens, width, n_threads);
}
