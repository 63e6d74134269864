// Rows and columns of a matrix by index: gathered into a packed copy, or spread from one into a full-size matrix of zeros.
// `spread` writes each element of the target once, kept or zero; torch needs a fill and then an indexed copy, and its indexed
// copies along dim 1 move one element at a time through a generic iterator. Bound by memory: bytes read plus bytes written.
#include "simd.h"

namespace fallow {

template <class T>
void gather_cols(T* out, const T* in, const int64_t* index, int64_t kept, int64_t rows, int64_t cols, int n_threads) {
  parallel(rows, n_threads, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = in + r * cols;
      T* to = out + r * kept;
      for (int64_t k = 0; k < kept; ++k) to[k] = from[index[k]];
    }
  });
}

template <class T>
void spread_cols(T* out, const T* in, const int64_t* index, int64_t kept, int64_t rows, int64_t cols, int n_threads) {
  parallel(rows, n_threads, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = in + r * kept;
      T* to = out + r * cols;
      std::memset(to, 0, size_t(cols) * sizeof(T));
      for (int64_t k = 0; k < kept; ++k) to[index[k]] = from[k];
    }
  });
}

}  // namespace fallow

// out[k, :] = in[index[k], :]; rows of `row_bytes` bytes, packed.
FALLOW_API void fallow_gather_rows(char* out, const char* in, const int64_t* index, int64_t kept, int64_t row_bytes, int n_threads) {
  fallow::parallel(kept, n_threads, [=](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) std::memcpy(out + k * row_bytes, in + index[k] * row_bytes, size_t(row_bytes));
  });
}

// out[index[k], :] = in[k, :], every other row of `out` zero. `index` is sorted and without repeats.
FALLOW_API void fallow_spread_rows(char* out, const char* in, const int64_t* index, int64_t kept, int64_t rows, int64_t row_bytes,
                                   int n_threads) {
  fallow::parallel(rows, n_threads, [=](int64_t begin, int64_t end) {
    const int64_t* next = std::lower_bound(index, index + kept, begin);
    for (int64_t r = begin; r < end; ++r) {
      if (next != index + kept && *next == r) {
        std::memcpy(out + r * row_bytes, in + (next - index) * row_bytes, size_t(row_bytes));
        ++next;
      } else {
        std::memset(out + r * row_bytes, 0, size_t(row_bytes));
      }
    }
  });
}

// out[r, k] = in[r, index[k]] for a [rows, cols] matrix of 2- or 4-byte elements.
FALLOW_API void fallow_gather_cols(void* out, const void* in, const int64_t* index, int64_t kept, int64_t rows, int64_t cols,
                                   int element_bytes, int n_threads) {
  if (element_bytes == 2)
    fallow::gather_cols(static_cast<uint16_t*>(out), static_cast<const uint16_t*>(in), index, kept, rows, cols, n_threads);
  else
    fallow::gather_cols(static_cast<uint32_t*>(out), static_cast<const uint32_t*>(in), index, kept, rows, cols, n_threads);
}

// out[r, index[k]] = in[r, k], every other element of `out` zero.
FALLOW_API void fallow_spread_cols(void* out, const void* in, const int64_t* index, int64_t kept, int64_t rows, int64_t cols,
                                   int element_bytes, int n_threads) {
  if (element_bytes == 2)
    fallow::spread_cols(static_cast<uint16_t*>(out), static_cast<const uint16_t*>(in), index, kept, rows, cols, n_threads);
  else
    fallow::spread_cols(static_cast<uint32_t*>(out), static_cast<const uint32_t*>(in), index, kept, rows, cols, n_threads);
}
