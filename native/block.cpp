// A linear layer whose weight is a grid of b x b tiles of which only some are there: forward, input gradient, tile gradients.
//   y[:, r] = sum of x[:, c] W_rc^T       dx[:, c] = sum of dy[:, r] W_rc       dW_rc = dy[:, r]^T x[:, c]
// bf16 goes to AMX (block_amx.cpp) where that is there. Elsewhere bf16 operands are widened to fp32 while they are packed and
// multiplied with fp32 FMAs. The obvious alternative, vdpbf16ps, does two products per lane, but Sapphire Rapids issues it a
// quarter as often: 87 GFLOP/s per core against 175.
// x and dy are packed into panels [grid column][token][b]: unit-stride, aligned rows whatever the width of the layer. Results are
// rounded once. Values of edge tiles outside the weight count as zero. Cost: 6 T n b^2 FLOP; workspace 24 MB of panels forward and
// 48 MB backward, with bf16 also fp32 sums of the tile gradients.
#include "block_amx.h"
#include "block_micro.h"

namespace fallow {

// -- packing and rounding ---------------------------------------------------------------------------------------------------------

constexpr int64_t kRound = 48;             // every register block's height divides it; panels hold a multiple of it
constexpr int64_t kPiece = 20 * kRound;    // tokens multiplied with a packed tile: packing one costs as much as 20 tokens
constexpr int64_t kHot = 4096;             // floats of x that a tile gradient rereads: 16 of the 48 KB of L1
constexpr int64_t kGroup = 8192;           // floats of packed tiles multiplied at once: the sums are read and written less often
constexpr int64_t kMaxGroup = 16;          // and their number
constexpr int64_t kPanelFloats = 6 << 20;  // 24 MB: glibc maps and unmaps every allocation over 32 MB anew

// The size of equal parts of `total`, of at most about `most`.
inline int64_t part_of(int64_t total, int64_t most) {
  return round_up(ceil_div(total, std::max<int64_t>(1, ceil_div(total, std::max(most, kRound)))), kRound);
}

template <class T>
struct FillPanels {
  template <bool kFma>
  static FALLOW_INLINE void run(const T* from, float* memory, int64_t width, int64_t block, int64_t capacity, int64_t tokens,
                                int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t c = 0; c * block < width; ++c) {
        const int64_t valid = t < tokens ? std::min(block, width - c * block) : 0;
        const T* __restrict in = from + t * width + c * block;
        float* __restrict to = memory + (c * capacity + t) * block;
        for (int64_t i = 0; i < valid; ++i) to[i] = to_float(in[i]);
        for (int64_t i = valid; i < block; ++i) to[i] = 0.0f;
      }
  }
};

// Panels [blocks][capacity][b] of some consecutive rows of a [tokens, width] matrix.
template <class T>
struct Panels {
  int64_t width, block, capacity;
  Floats memory;
  Panels(int64_t width, int64_t block, int64_t capacity)
      : width(width), block(block), capacity(capacity), memory(round_up(width, block) * capacity) {}

  const float* at(int64_t number, int64_t token) const { return memory.data + (number * capacity + token) * block; }
  void fill(const T* from, int64_t tokens, int n_threads) {
    parallel(round_up(tokens, kRound), n_threads, [&](int64_t begin, int64_t end) {
      dispatch<FillPanels<T>>(from, memory.data, width, block, capacity, tokens, begin, end);
    });
  }
};

template <class T>
struct WidenTile {  // with zeros outside the weight
  template <bool kFma>
  static FALLOW_INLINE void run(const T* __restrict from, float* __restrict to, int64_t block, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < block; ++i)
      for (int64_t j = 0; j < block; ++j) to[i * block + j] = i < rows && j < cols ? to_float(from[i * block + j]) : 0.0f;
  }
};

template <class T>
struct Emit {  // to [rows, cols] = from + bias, rounded
  template <bool kFma>
  static FALLOW_INLINE void run(const float* from, int64_t stride, const float* bias, T* to, int64_t to_stride, int64_t rows,
                                int64_t cols) {
    for (int64_t t = 0; t < rows; ++t) {
      const float* __restrict in = from + t * stride;
      const float* __restrict add = bias;
      T* __restrict out = to + t * to_stride;
      for (int64_t i = 0; i < cols; ++i) from_float(in[i] + add[i], &out[i]);
    }
  }
};

// -- the products -----------------------------------------------------------------------------------------------------------------

struct Call {
  const BlockGrid& g;
  Isa level;
  int n_threads;

  // to [tokens, out] = from W^T + bias (forward), or to [tokens, in] = from W; `from` in panels.
  template <class T>
  void apply(bool forward, const T* values, const Panels<T>& from, const float* bias, T* to, int64_t tokens) const {
    const int64_t b = g.block, width = forward ? g.out : g.in;
    const int64_t group = std::min(kMaxGroup, std::max<int64_t>(1, kGroup / (b * b)));
    const int64_t piece = part_of(tokens, kPiece), pieces = ceil_div(tokens, piece), items = ceil_div(width, b) * pieces;
    const int32_t *start = forward ? g.row_start : g.col_start, *inner = forward ? g.cols : g.rows;
    share(items, n_threads, [&](std::atomic<int64_t>& next) {
      Floats sums(piece * b), packed(group * b * b), widened(b * b), no_bias(b);
      std::fill_n(no_bias.data, b, 0.0f);
      const float *a[kMaxGroup], *w[kMaxGroup];
      for (int64_t item; (item = next++) < items;) {
        const int64_t o = item / pieces, t0 = item % pieces * piece, rows = std::min(piece, tokens - t0);
        if (start[o] == start[o + 1]) std::fill_n(sums.data, rows * b, 0.0f);
        for (int64_t first = start[o], count; first < start[o + 1]; first += count) {
          count = std::min<int64_t>(group, start[o + 1] - first);
          for (int64_t q = 0; q < count; ++q) {
            const int64_t n = forward ? first + q : g.col_order[first + q];
            float* tile = packed.data + q * b * b;
            dispatch<WidenTile<T>>(values + n * b * b, forward ? widened.data : tile, b, g.out - g.rows[n] * b,
                                   g.in - g.cols[n] * b);
            if (forward) transpose(level, widened.data, tile, b);
            a[q] = from.at(inner[n], t0), w[q] = tile;
          }
          multiply<false>(level, Product{a, w, count, b, b, sums.data, first == start[o]}, rows);
        }
        dispatch<Emit<T>>(sums.data, b, bias ? bias + o * b : no_bias.data, to + t0 * width + o * b, width, rows,
                          std::min(b, width - o * b));
      }
    });
  }

  // sums [n, b, b] (+)= dy^T x of each tile; after the last tokens they are rounded into `to` (for fp32, `sums` itself).
  template <class T>
  void gradient(const Panels<T>& dy, const Panels<T>& x, float* sums, T* to, int64_t tokens, bool first, bool last) const {
    const int64_t b = g.block, depth = std::max<int64_t>(16, kHot / b);
    share(g.n, n_threads, [&](std::atomic<int64_t>& next) {
      Floats no_bias(b);
      std::fill_n(no_bias.data, b, 0.0f);
      for (int64_t n; (n = next++) < g.n;) {
        float* sum = sums + n * b * b;
        for (int64_t t = 0; t < tokens; t += depth) {
          const float *a = dy.at(g.rows[n], t), *w = x.at(g.cols[n], t);
          multiply<true>(level, Product{&a, &w, 1, std::min(depth, tokens - t), b, sum, first && t == 0}, b);
        }
        if (!last) continue;
        T* tile = to + n * b * b;
        if constexpr (sizeof(T) == 2) dispatch<Emit<T>>(sum, b, no_bias.data, tile, b, b, b);
        // an infinite x would leave NaN in the padding of an edge tile
        const int64_t rows = std::min(b, g.out - g.rows[n] * b), cols = std::min(b, g.in - g.cols[n] * b);
        for (int64_t i = 0; i < b; ++i)
          for (int64_t j = i < rows ? cols : 0; j < b; ++j) from_float(0.0f, &tile[i * b + j]);
      }
    });
  }
};

template <class T>
void forward(const Call& call, const T* values, const T* x, const float* bias, T* y, int64_t tokens) {
  const BlockGrid& g = call.g;
  const int64_t chunk = part_of(tokens, kPanelFloats / round_up(g.in, g.block));
  Panels<T> panels(g.in, g.block, chunk);
  for (int64_t t = 0; t < tokens; t += chunk) {
    const int64_t count = std::min(chunk, tokens - t);
    panels.fill(x + t * g.in, count, call.n_threads);
    call.apply(true, values, panels, bias, y + t * g.out, count);
  }
}

template <class T>
void backward(const Call& call, const T* values, const T* x, const T* dy, T* dx, T* dvalues, int64_t tokens) {
  const BlockGrid& g = call.g;
  const int64_t chunk = part_of(tokens, kPanelFloats / round_up(std::max(g.in, g.out), g.block));
  Panels<T> dy_panels(g.out, g.block, chunk), x_panels(g.in, g.block, dvalues ? chunk : 0);
  Floats wide_sums(dvalues && sizeof(T) == 2 ? g.n * g.block * g.block : 0);
  float* sums = sizeof(T) == 2 ? wide_sums.data : reinterpret_cast<float*>(dvalues);
  for (int64_t t = 0; t < tokens; t += chunk) {
    const int64_t count = std::min(chunk, tokens - t);
    dy_panels.fill(dy + t * g.out, count, call.n_threads);
    if (dx) call.apply(false, values, dy_panels, nullptr, dx + t * g.in, count);
    if (!dvalues) continue;
    x_panels.fill(x + t * g.in, count, call.n_threads);
    call.gradient(dy_panels, x_panels, sums, dvalues, count, t == 0, t + chunk >= tokens);
  }
}

// `level` 0, 1, 2 asks for plain C++, AVX2 or AVX-512 register blocks, 3 for AMX, as far as this CPU has them; -1 for the best.
constexpr int kAmxLevel = 3;
inline bool on_amx(const BlockGrid* grid, int is_bf16, int level) {
  return is_bf16 && (level < 0 || level >= kAmxLevel) && amx_serves(*grid);
}

// Starting a thread costs as much as the first million products.
inline Call make_call(const BlockGrid* grid, int64_t tokens, int n_threads, int level) {
  const bool small = tokens * grid->n * grid->block * grid->block < (1 << 20);
  return {*grid, level < 0 ? isa() : Isa(std::min(level, int(isa()))), small ? 1 : n_threads};
}

}  // namespace fallow

using namespace fallow;

// y [tokens, out] = x W^T + bias; values [n, b, b], x and y bf16 or fp32, bias fp32 padded to whole tiles, or null.
FALLOW_API void fallow_block_forward(const BlockGrid* grid, const void* values, const void* x, const float* bias, void* y,
                                     int64_t tokens, int is_bf16, int n_threads, int level) {
  if (on_amx(grid, is_bf16, level))
    return amx_forward(*grid, static_cast<const bf16*>(values), static_cast<const bf16*>(x), bias, static_cast<bf16*>(y), tokens,
                       n_threads);
  const Call call = make_call(grid, tokens, n_threads, level);
  if (is_bf16) forward(call, static_cast<const bf16*>(values), static_cast<const bf16*>(x), bias, static_cast<bf16*>(y), tokens);
  else forward(call, static_cast<const float*>(values), static_cast<const float*>(x), bias, static_cast<float*>(y), tokens);
}

// dx [tokens, in] and dvalues [n, b, b]; either may be null.
FALLOW_API void fallow_block_backward(const BlockGrid* grid, const void* values, const void* x, const void* dy, void* dx,
                                      void* dvalues, int64_t tokens, int is_bf16, int n_threads, int level) {
  if (on_amx(grid, is_bf16, level))
    return amx_backward(*grid, static_cast<const bf16*>(values), static_cast<const bf16*>(x), static_cast<const bf16*>(dy),
                        static_cast<bf16*>(dx), static_cast<bf16*>(dvalues), tokens, n_threads);
  const Call call = make_call(grid, tokens, n_threads, level);
  if (is_bf16)
    backward(call, static_cast<const bf16*>(values), static_cast<const bf16*>(x), static_cast<const bf16*>(dy),
             static_cast<bf16*>(dx), static_cast<bf16*>(dvalues), tokens);
  else
    backward(call, static_cast<const float*>(values), static_cast<const float*>(x), static_cast<const float*>(dy),
             static_cast<float*>(dx), static_cast<float*>(dvalues), tokens);
}

// The best `level` here.
FALLOW_API int fallow_isa() { return amx_available() ? kAmxLevel : int(isa()); }
