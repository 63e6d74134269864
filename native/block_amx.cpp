// The three products of a layer of tiles (block.cpp says which) in bf16 on AMX: 16 x 16 sums in a tile register, 8,192 multiply-adds
// per instruction, 32 x 32 sums at a time so that each load feeds one instruction. The obvious alternative, a dense GEMM per tile,
// writes y once per tile; here the sums of a line of the grid stay in registers over all of its tiles.
// At these rates memory is the limit. Measured per core of Granite Rapids: 3.8 TFLOP/s with an operand in L1, 2.8 with both in L2,
// about 1.1 here, which is what oneDNN's dense GEMM makes. So lines are walked for as many tokens as keep their x in L2, and tile
// gradients for as many columns of the grid as do; what comes next from L3 is fetched meanwhile (5 to 10 %).
// AMX takes bf16 and fp32 subnormals for zero, as oneDNN's dense GEMM does on the same CPU.
// Workspace: a copy of the tiles, 1.3 MB of x per thread, 24 MB of dy and fp32 sums of a strip of tiles (of all, past 24 MB of dy).
#include "block_amx.h"

#include <vector>

#include "amx_blocks.h"

#if FALLOW_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fallow {

bool amx_available() {
  static const bool found = [] {
    unsigned a, b, c, d;
    if (isa() != Isa::avx512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = (d >> 24) & 1, bf16_products = (d >> 22) & 1;
    if (!tiles || !bf16_products || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !((a >> 5) & 1)) return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTileState = 3u << 17;
    if ((low & kTileState) != kTileState) return false;
    // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): for the whole process, threads started later included
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return found;
}

namespace {

constexpr int64_t kPanel = 5 << 17;            // entries of x that stay in L2 (1.3 of 2 MB) while the grid is walked
constexpr int64_t kPiece = 1024;               // tokens whose tile gradients are summed in registers
constexpr int64_t kPanels = 12 << 20;          // entries of dy cut up at once for tile gradients
constexpr int64_t kSmall = 1 << 23;            // products that take as long as starting a thread

// The lines of the grid times some tokens: to [tokens, out] = from W^T + bias (a line is a row of tiles), or to [tokens, in] = from W
// (a line is a column).
struct Lines {
  const BlockGrid& g;
  bool forward;
  bf16* tiles;  // right operands [line][32 outputs][tile of the line][32 inputs], zero outside the weight
  const bf16* from;
  const float* bias;
  bf16* to;
  int64_t tokens, chunk, parts;

  Lines(const BlockGrid& g, bool forward, bf16* tiles, const bf16* from, const float* bias, bf16* to, int64_t tokens, int n_threads)
      : g(g), forward(forward), tiles(tiles), from(from), bias(bias), to(to), tokens(tokens) {
    const int64_t fitting = std::max(kSide, kPanel / inner() / kSide * kSide);
    chunk = round_up(ceil_div(tokens, round_up(ceil_div(tokens, fitting), n_threads)), kSide);
    parts = ceil_div(tokens, chunk) < n_threads ? std::min<int64_t>(n_threads, n_lines()) : 1;
  }
  int64_t inner() const { return round_up(forward ? g.in : g.out, g.block); }
  int64_t outer() const { return forward ? g.out : g.in; }
  int64_t n_lines() const { return ceil_div(outer(), g.block); }
  int64_t items() const { return ceil_div(tokens, chunk) * parts; }
  const int32_t* start() const { return forward ? g.row_start : g.col_start; }

  void cut_line(const bf16* values, int64_t line) const {
    const int64_t b = g.block, per = b / kSide, first = start()[line], count = start()[line + 1] - first;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t n = forward ? first + q : g.col_order[first + q], rows = g.out - g.rows[n] * b, cols = g.in - g.cols[n] * b;
      for (int64_t i = 0; i < per; ++i)
        for (int64_t j = 0; j < per; ++j) {
          const bf16* block = values + n * b * b + i * kSide * b + j * kSide;
          bf16* place = tiles + first * b * b + (((forward ? i : j) * count + q) * per + (forward ? j : i)) * kBlock;
          (forward ? cut_right_across : cut_right)(block, b, std::min(kSide, rows - i * kSide), mask_of(cols - j * kSide), place);
        }
    }
  }

  // Some tokens times some lines. `panel` takes the tokens, [32 tokens][32 inputs]; `offset` the places in it of a line's tiles.
  void run(int64_t item, bf16* panel, int64_t* offset, float* sums) const {
    const int64_t b = g.block, per = b / kSide, width = forward ? g.in : g.out, depth = inner() / kSide;
    const int64_t t0 = item / parts * chunk, part = item % parts, count = std::min(chunk, tokens - t0);
    const int64_t blocks = ceil_div(count, kSide);
    for (int64_t t = 0; t < blocks; ++t)
      for (int64_t k = 0; k < depth; ++k)
        cut_left(from + (t0 + t * kSide) * width + k * kSide, width, std::min(kSide, count - t * kSide), mask_of(width - k * kSide),
                 panel + (t * depth + k) * kBlock);
    const int64_t begin = part * n_lines() / parts, end = (part + 1) * n_lines() / parts;
    for (int64_t line = begin; line < end; ++line) {
      const int64_t first = start()[line], n = start()[line + 1] - first, next = line + 1 < end ? line + 1 : begin;
      const int64_t halves = std::min(per, ceil_div(outer() - line * b, kSide));
      for (int64_t q = 0; q < n; ++q) offset[q] = (forward ? g.cols[first + q] : g.rows[g.col_order[first + q]]) * per * kBlock;
      Ahead ahead(tiles + start()[next] * b * b, tiles + start()[next + 1] * b * b, blocks * halves * n * per);
      for (int64_t t = 0; t < blocks; ++t)
        for (int64_t h = 0; h < halves; ++h) {
          const int64_t column = line * b + h * kSide;
          multiply(panel + t * depth * kBlock, offset, n, per, tiles + first * b * b + h * n * per * kBlock, sums, true, ahead);
          emit(sums, bias ? bias + column : nullptr, to + (t0 + t * kSide) * outer() + column, outer(),
               std::min(kSide, count - t * kSide), mask_of(outer() - column));
        }
    }
  }
};

// Tile gradients of some tokens. dy is cut up beforehand, [32 outputs][32 tokens]; x by each thread, for as many columns of the
// grid and as many tokens as stay in L2.
struct Gradients {
  const BlockGrid& g;
  const bf16 *dy, *x;
  bf16 *dy_blocks, *to;
  float* sums;  // [n, b, b] in blocks of 32 x 32, or null where these are all the tokens
  int64_t tokens, piece, strips;
  bool first, last;

  int64_t depth() const { return ceil_div(tokens, kSide); }
  int64_t columns() const { return ceil_div(g.in, g.block); }
  int64_t strip_width() const { return ceil_div(columns(), strips); }
  int64_t strip_tiles() const {
    int64_t most = 0;
    for (int64_t s = 0; s < strips; ++s)
      most = std::max<int64_t>(most, g.col_start[(s + 1) * columns() / strips] - g.col_start[s * columns() / strips]);
    return most;
  }

  void cut_dy(int64_t t) const {  // 32 tokens
    for (int64_t k = 0; k * kSide < g.out; ++k)
      cut_left_across(dy + t * kSide * g.out + k * kSide, g.out, std::min(kSide, tokens - t * kSide), mask_of(g.out - k * kSide),
                      dy_blocks + (k * depth() + t) * kBlock);
  }

  struct Run {  // the tiles of a row within a strip
    int64_t row, first, count;
  };
  void run(int64_t strip, bf16* panel, std::vector<Run>& runs, float* own) const {
    const int64_t begin = strip * columns() / strips, end = (strip + 1) * columns() / strips, b = g.block, per = b / kSide;
    runs.clear();
    for (int64_t row = 0; row * b < g.out; ++row) {
      const int32_t *from = g.cols + g.row_start[row], *to = g.cols + g.row_start[row + 1];
      const int32_t *low = std::lower_bound(from, to, begin), *high = std::lower_bound(low, to, end);
      if (low < high) runs.push_back({row, low - g.cols, high - low});
    }
    for (int64_t t0 = 0; t0 < depth(); t0 += piece) {
      const int64_t steps = std::min(piece, depth() - t0), offset = 0;
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t k = begin * per; k < end * per; ++k)
          cut_right(x + (t0 + t) * kSide * g.in + k * kSide, g.in, std::min(kSide, tokens - (t0 + t) * kSide),
                    mask_of(g.in - k * kSide), panel + ((k - begin * per) * steps + t) * kBlock);
      float* c = own;
      for (size_t r = 0; r < runs.size(); ++r) {
        const Run& run = runs[r];
        if (sums) c = sums + run.first * b * b;
        for (int64_t i = 0; i < per; ++i) {
          const auto left = [&](int64_t row, int64_t i) { return dy_blocks + ((row * per + i) * depth() + t0) * kBlock; };
          const bf16* a = left(run.row, i);
          const bf16* next = i + 1 < per ? left(run.row, i + 1) : r + 1 < runs.size() ? left(runs[r + 1].row, 0) : a;
          Ahead ahead(next, next + steps * kBlock, run.count * per * steps);
          for (int64_t q = 0; q < run.count; ++q)
            for (int64_t j = 0; j < per; ++j) {
              const int64_t n = run.first + q, column = g.cols[n] * per + j;
              const int64_t rows = std::max<int64_t>(0, std::min(kSide, g.out - (run.row * per + i) * kSide));
              const __mmask32 mask = mask_of(g.in - column * kSide);
              float* sum = c + ((q * per + i) * per + j) * kBlock;
              if (rows && mask)
                multiply(a, &offset, 1, steps, panel + (column - begin * per) * steps * kBlock, sum, first && t0 == 0, ahead);
              if (last && t0 + piece >= depth()) round(sum, to + n * b * b + i * kSide * b + j * kSide, rows, mask);
            }
        }
        c += run.count * b * b;
      }
    }
  }
  void round(const float* sum, bf16* out, int64_t rows, __mmask32 mask) const {
    if (mask) emit(sum, nullptr, out, g.block, rows, mask);
    if (rows == kSide && mask == ~__mmask32(0)) return;
    for (int64_t y = 0; y < kSide; ++y)  // an infinite x would leave NaN beyond the edge
      for (int64_t z = 0; z < kSide; ++z)
        if (y >= rows || !((mask >> z) & 1)) out[y * g.block + z] = bf16{0};
  }
};

// The lines of the grid for all tokens.
void apply(const BlockGrid& g, bool forward, const bf16* values, const bf16* from, const float* bias, bf16* to, int64_t tokens,
           int n_threads) {
  Workspace<bf16> tiles(g.n * g.block * g.block);
  const Lines lines(g, forward, tiles.data, from, bias, to, tokens, n_threads);
  share(lines.n_lines(), n_threads, [&](std::atomic<int64_t>& next) {
    for (int64_t line; (line = next++) < lines.n_lines();) lines.cut_line(values, line);
  });
  share(lines.items(), n_threads, [&](std::atomic<int64_t>& next) {
    Workspace<bf16> panel(lines.inner() * lines.chunk);
    Workspace<int64_t> offset(lines.inner() / g.block);
    Floats sums(kBlock);
    open_tiles();
    for (int64_t item; (item = next++) < lines.items();) lines.run(item, panel.data, offset.data, sums.data);
    close_tiles();
  });
}

int threads_for(const BlockGrid& g, int64_t tokens, int n_threads) {
  return tokens * g.n * g.block * g.block < kSmall ? 1 : n_threads;
}

}  // namespace

void amx_forward(const BlockGrid& g, const bf16* values, const bf16* x, const float* bias, bf16* y, int64_t tokens, int n_threads) {
  if (tokens > 0) apply(g, true, values, x, bias, y, tokens, threads_for(g, tokens, n_threads));
}

void amx_backward(const BlockGrid& g, const bf16* values, const bf16* x, const bf16* dy, bf16* dx, bf16* dvalues, int64_t tokens,
                  int n_threads) {
  n_threads = threads_for(g, tokens, n_threads);
  if (dx && tokens > 0) apply(g, false, values, dy, nullptr, dx, tokens, n_threads);
  if (!dvalues || tokens == 0) return;
  const int64_t height = round_up(g.out, g.block), columns = ceil_div(g.in, g.block);
  const int64_t fitting = std::max(kSide, kPanels / height / kSide * kSide);
  const int64_t chunk = round_up(ceil_div(tokens, ceil_div(tokens, fitting)), kSide);
  Workspace<bf16> dy_blocks(height * chunk);
  Floats sums(chunk < tokens ? g.n * g.block * g.block : 0);
  const int64_t piece = ceil_div(chunk / kSide, ceil_div(chunk, kPiece));
  const int64_t fit_columns = std::max<int64_t>(1, kPanel / (piece * kSide * g.block));
  const int64_t strips = std::min(columns, round_up(ceil_div(columns, fit_columns), n_threads));
  for (int64_t t = 0; t < tokens; t += chunk) {
    const Gradients work{g, dy + t * g.out, x + t * g.in, dy_blocks.data, dvalues, chunk < tokens ? sums.data : nullptr,
                         std::min(chunk, tokens - t), piece, strips, t == 0, t + chunk >= tokens};
    share(work.depth(), n_threads, [&](std::atomic<int64_t>& next) {
      for (int64_t item; (item = next++) < work.depth();) work.cut_dy(item);
    });
    share(strips, n_threads, [&](std::atomic<int64_t>& next) {
      Workspace<bf16> panel(work.strip_width() * g.block * piece * kSide);
      std::vector<Gradients::Run> runs;
      Floats own(work.sums ? 0 : work.strip_tiles() * g.block * g.block);
      open_tiles();
      for (int64_t item; (item = next++) < strips;) work.run(item, panel.data, runs, own.data);
      close_tiles();
    });
  }
}

}  // namespace fallow

#else

namespace fallow {

bool amx_available() { return false; }
void amx_forward(const BlockGrid&, const bf16*, const bf16*, const float*, bf16*, int64_t, int) {}
void amx_backward(const BlockGrid&, const bf16*, const bf16*, const bf16*, bf16*, bf16*, int64_t, int) {}

}  // namespace fallow

#endif
