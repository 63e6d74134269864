// Rows of one type and the inputs that meet them. Inputs are prepared once per call so that a row is used as it is loaded: for bf16
// rows as 2 W numbers at a time, those of even place first (a bf16 is the upper half of a float: one shift or one mask, no shuffle); for
// int8 rows as 16-bit numbers with a scale per kSpan, because 16 bits hold what bf16 inputs are to within their own rounding.
// y is kept in the order of the inputs.

struct FloatRow {
  using T = float;
  using Input = float;
  static constexpr int64_t kStep = W;
  static constexpr bool kSpans = false;
  struct Sum {
    F total;
  };
  struct Part {
    F v;
  };
  static inline Sum none() { return {zero()}; }
  static inline Part input(const Input* x) { return {load(x)}; }
  static inline void dot(Sum& s, const T* w, const Part& x) { s.total = fma(load(w), x.v, s.total); }
  static inline void flush(Sum&, float) {}
  static inline Part output(const float* y) { return {load(y)}; }
  static inline void put(float* y, const Part& p) { store(y, p.v); }
  static inline void axpy(Part& y, F h, const T* w) { y.v = fma(h, load(w), y.v); }
};

struct Bf16Row {
  using T = bf16;
  using Input = float;
  static constexpr int64_t kStep = 2 * W;
  static constexpr bool kSpans = false;
  struct Sum {
    F total;
  };
  struct Part {
    F even, odd;
  };
  static inline Sum none() { return {zero()}; }
  static inline Part input(const Input* x) { return {load(x), load(x + W)}; }
  static inline void dot(Sum& s, const T* w, const Part& x) {
    F even, odd;
    halves(w, even, odd);
    s.total = fma(odd, x.odd, fma(even, x.even, s.total));
  }
  static inline void flush(Sum&, float) {}
  static inline Part output(const float* y) { return {load(y), load(y + W)}; }
  static inline void put(float* y, const Part& p) {
    store(y, p.even);
    store(y + W, p.odd);
  }
  static inline void axpy(Part& y, F h, const T* w) {
    F even, odd;
    halves(w, even, odd);
    y.even = fma(h, even, y.even);
    y.odd = fma(h, odd, y.odd);
  }
};

struct Int8Row {
  using T = int8_t;
  using Input = int16_t;
  static constexpr int64_t kStep = 2 * W;
  static constexpr bool kSpans = true;
  struct Sum {
    F total;
    I span;
  };
  struct Part {
    F low, high;
  };
  static inline Sum none() { return {zero(), izero()}; }
  static inline const Input* input(const Input* x) { return x; }
  static inline void dot(Sum& s, const T* w, const Input* x) { s.span = dot16(w, x, s.span); }
  static inline void flush(Sum& s, float scale) {
    s.total = fma(to_floats(s.span), set1(scale), s.total);
    s.span = izero();
  }
  static inline Part output(const float* y) { return {load(y), load(y + W)}; }
  static inline void put(float* y, const Part& p) {
    store(y, p.low);
    store(y + W, p.high);
  }
  static inline void axpy(Part& y, F h, const T* w) {
    y.low = fma(h, from8(w), y.low);
    y.high = fma(h, from8(w + W), y.high);
  }
};

constexpr int64_t kLine = 64;  // bytes

// Entries of a row that are left over from whole lines, zeros after them.
template <class R>
struct Tail {
  static constexpr int64_t kEntries = kLine / int64_t(sizeof(typename R::T));
  typename R::T rest[kEntries];
  Tail(const typename R::T* row, int64_t at, int64_t width) {
    __builtin_memset(rest, 0, sizeof rest);
    __builtin_memcpy(rest, row + at, size_t(width - at) * sizeof(typename R::T));
  }
};

// Asks for the line `ahead` bytes on in each row, in `next` past a row's end. Into the first-level cache: all that is asked for at once,
// by all rows, must fit its some 48 outstanding lines; past that it is slower than asking for nothing.
template <int N>
inline void ask(const void* const* rows, const void* const* next, int64_t at, int64_t row_bytes) {
  const void* const* of = at < row_bytes ? rows : next;
  at -= at < row_bytes ? 0 : row_bytes;
  for (int n = 0; n < N; ++n) __builtin_prefetch(static_cast<const char*>(of[n]) + at, 0, 3);
}

// sums[m][n] = rows[m] . x[n], and y += the sum over k of h[k] rows[M + k]. next: the rows that will come after these, in their order.
template <class R, int M, int N, int K, int kAhead>
inline void sweep(const typename R::T* const* rows, const typename R::T* const* next, const typename R::Input* const* x,
                  const float* const* scale, int64_t width, typename R::Sum (*sums)[N], const F* h, float* y) {
  constexpr int64_t kEntries = Tail<R>::kEntries;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = R::none();
  const int64_t whole = width / kEntries * kEntries, span = R::kSpans ? kSpan : whole + 1;
  const int64_t size = int64_t(sizeof(typename R::T));
  int64_t s = 0;
  for (int64_t begin = 0; begin < whole; begin += span, ++s) {
    const int64_t end = begin + span < whole ? begin + span : whole;
    for (int64_t line = begin; line < end; line += kEntries) {
      ask<M + K>(reinterpret_cast<const void* const*>(rows), reinterpret_cast<const void* const*>(next), line * size + kAhead,
                 width * size);
      for (int64_t i = line; i < line + kEntries; i += R::kStep) {
        for (int n = 0; n < N; ++n) {
          const auto part = R::input(x[n] + i);
          for (int m = 0; m < M; ++m) R::dot(sums[m][n], rows[m] + i, part);
        }
        if constexpr (K > 0) {
          auto out = R::output(y + i);
          for (int k = 0; k < K; ++k) R::axpy(out, h[k], rows[M + k] + i);
          R::put(y + i, out);
        }
      }
    }
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) R::flush(sums[m][n], scale[n][s]);
  }
  if (whole == width) return;
  for (int m = 0; m < M + K; ++m) {
    const Tail<R> tail(rows[m], whole, width);
    for (int64_t i = 0; i < kEntries; i += R::kStep) {
      if (m < M) {
        for (int n = 0; n < N; ++n) R::dot(sums[m][n], tail.rest + i, R::input(x[n] + whole + i));
        continue;
      }
      auto out = R::output(y + whole + i);
      R::axpy(out, h[m - M], tail.rest + i);
      R::put(y + whole + i, out);
    }
    for (int n = 0; n < N && m < M; ++n) R::flush(sums[m][n], scale[n][whole / kSpan]);
  }
}
