// Dot products by cache lines, in vectors of 16 floats that the compiler turns into the registers there are.
//
// A bf16 is the upper half of a float, so the even and the odd entries of a line are one shift and one mask away; unpacking them in
// order takes five instructions instead of two. The other side of the product, read many times, is laid out for it once by `spread`.
#pragma once

#include "team.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#endif

namespace fallow {

using Lanes = float __attribute__((vector_size(64)));
using Bits = uint32_t __attribute__((vector_size(64)));

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

// A line as floats: of bf16 the even entries and the odd ones, of fp32 the line itself and nothing.
FALLOW_INLINE void split(const float* from, Lanes* first, Lanes*) { std::memcpy(first, from, 64); }
FALLOW_INLINE void split(const bf16* from, Lanes* even, Lanes* odd) {
  Bits both;
  std::memcpy(&both, from, 64);
  *even = reinterpret_cast<Lanes>(both << 16);
  *odd = reinterpret_cast<Lanes>(both & 0xffff0000u);
}

// The products of a split line with the same line of a `spread` vector.
template <class T>
FALLOW_INLINE Lanes dot_line(const Lanes& first, const Lanes& second, const float* x) {
  Lanes a, b;
  std::memcpy(&a, x, 64);
  if constexpr (kLine<T> == 16) return first * a;
  std::memcpy(&b, x + 16, 64);
  return first * a + second * b;
}

// x as floats; in whole lines of bf16 the even entries first. What is left of a row stays in order.
inline void spread(const float* x, int64_t width, float* out) { std::copy(x, x + width, out); }
inline void spread(const bf16* x, int64_t width, float* out) {
  const int64_t whole = width / kLine<bf16> * kLine<bf16>;
  for (int64_t i = 0; i < whole; ++i) out[i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = to_float(x[i]);
  for (int64_t i = whole; i < width; ++i) out[i] = to_float(x[i]);
}

// The inverse of `split`, rounded.
FALLOW_INLINE void join(const Lanes& first, const Lanes&, float* out) { std::memcpy(out, &first, 64); }
FALLOW_INLINE void join(const Lanes& even, const Lanes& odd, bf16* out) {
  for (int j = 0; j < 16; ++j) from_float(even[j], out + 2 * j), from_float(odd[j], out + 2 * j + 1);
}

// Sums that lie in the order of `spread`: a line of them, and all of them in their own order.
template <class T>
FALLOW_INLINE void load_two(const float* from, Lanes* first, Lanes* second) {
  std::memcpy(first, from, 64);
  if constexpr (kLine<T> > 16) std::memcpy(second, from + 16, 64);
}
template <class T>
FALLOW_INLINE void store_two(const Lanes& first, const Lanes& second, float* to) {
  std::memcpy(to, &first, 64);
  if constexpr (kLine<T> > 16) std::memcpy(to + 16, &second, 64);
}
template <class Finish>
FALLOW_INLINE void gather(const float* spread, int64_t n, float* out, const Finish& finish) {
  for (int64_t i = 0; i < n; ++i) out[i] = finish(i, spread[i]);
}
template <class Finish>
FALLOW_INLINE void gather(const float* spread, int64_t n, bf16* out, const Finish& finish) {
  const int64_t whole = n / kLine<bf16> * kLine<bf16>;
  for (int64_t base = 0; base < whole; base += 32)
    for (int64_t j = 0; j < 16; ++j) {
      from_float(finish(base + 2 * j, spread[base + j]), out + base + 2 * j);
      from_float(finish(base + 2 * j + 1, spread[base + 16 + j]), out + base + 2 * j + 1);
    }
  for (int64_t i = whole; i < n; ++i) from_float(finish(i, spread[i]), out + i);
}

FALLOW_INLINE float total(const Lanes& v) {
  float part[16];
  std::memcpy(part, &v, 64);
  for (int n = 8; n > 0; n /= 2)
    for (int j = 0; j < n; ++j) part[j] += part[j + n];
  return part[0];
}

// work(piece) for every piece, each thread taking the next one when it is done with its own.
template <class Work>
void share_out(int64_t pieces, int n_threads, const Work& work) {
  std::atomic<int64_t> next{0};
  with_team(int(std::min<int64_t>(n_threads, pieces)), [&](Team&, int) {
    for (int64_t i = next.fetch_add(1); i < pieces; i = next.fetch_add(1)) work(i);
  });
}

}  // namespace fallow
