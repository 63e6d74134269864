// The logarithm of a row's sum of exponentials, the row kept in cache between its two passes.
#pragma once

#include <cmath>
#include <limits>

#include "exp.h"

namespace fallow {

constexpr int kLanes = 64;

template <class T>
struct LogSumExp {
  template <bool kFma>
  static FALLOW_INLINE void run(const T* row_in, int64_t width, float* out) {
    const T* __restrict row = row_in;
    float top[kLanes], sum[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      top[j] = -std::numeric_limits<float>::infinity();
      sum[j] = 0.0f;
    }
    const int64_t whole = width - width % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; ++j) {
        const float x = to_float(row[i + j]);
        top[j] = x > top[j] ? x : top[j];
      }
    float max = -std::numeric_limits<float>::infinity();
    for (int j = 0; j < kLanes; ++j) max = top[j] > max ? top[j] : max;
    for (int64_t i = whole; i < width; ++i) max = to_float(row[i]) > max ? to_float(row[i]) : max;
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; ++j) sum[j] += exp_nonpositive<kFma>(to_float(row[i + j]) - max);
    float total = 0.0f;
    for (int j = 0; j < kLanes; ++j) total += sum[j];
    for (int64_t i = whole; i < width; ++i) total += exp_nonpositive<kFma>(to_float(row[i]) - max);
    *out = max + std::log(total);
  }
};

}  // namespace fallow
