// What the kernels of native/block.cpp and native/block_amx.cpp share: the grid of tiles, workspace, and work handed out by item.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace fallow {

struct BlockGrid {
  const int32_t *rows, *cols;                       // [n]: coordinates of each tile, row-major
  const int32_t *row_start, *col_start, *col_order; // CSR offsets; CSC offsets and the tiles in that order
  int64_t n, out, in, block;
};

// Uninitialised memory on a cache line boundary. glibc maps and unmaps every allocation over 32 MB anew: keep below.
template <class T>
struct Workspace {
  T* data;
  explicit Workspace(int64_t n)
      : data(static_cast<T*>(std::aligned_alloc(64, size_t((n * int64_t(sizeof(T)) + 63) / 64 * 64 + 64)))) {
    if (!data) throw std::bad_alloc();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data); }
};
using Floats = Workspace<float>;

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// work(next) on each thread; the items are what `next++` gives below `items`. Handed out one by one, because rows of the grid hold
// different numbers of tiles.
template <class Work>
void share(int64_t items, int n_threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t n = std::max<int64_t>(1, std::min<int64_t>(items, n_threads));
  parallel(n, int(n), [&](int64_t, int64_t) { work(next); });
}

}  // namespace fallow
