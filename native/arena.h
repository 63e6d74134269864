// Scratch memory for kernels that are called every few microseconds.
#pragma once

#include <cstdlib>

#include "simd.h"

namespace fallow {

// Memory of a thread that lasts from call to call: a fresh one would cost its page faults every time.
class Arena {
 public:
  ~Arena() { std::free(data_); }
  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = static_cast<char*>(std::aligned_alloc(4096, size_t(size_)));
  }
  template <class T>
  T* take(int64_t n) {
    T* found = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes<T>(n);
    return found;
  }
  template <class T>
  static int64_t bytes(int64_t n) {
    return (n * int64_t(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace fallow
