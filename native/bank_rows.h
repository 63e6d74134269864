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
    F total, odd;
  };
  struct Part {
    F even, odd;
  };
  static inline Sum none() { return {zero(), zero()}; }
  static inline Part input(const Input* x) { return {load(x), load(x + W)}; }
  static inline void dot(Sum& s, const T* w, const Part& x) {
    F even, odd;
    halves(w, even, odd);
    s.total = fma(even, x.even, s.total);
    s.odd = fma(odd, x.odd, s.odd);
  }
  static inline void flush(Sum& s, float) {
    s.total = add(s.total, s.odd);
    s.odd = zero();
  }
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

// Where the step of a row that begins at `at` is cut short by the row's end, its entries, zeros after them.
template <class R>
struct Tail {
  typename R::T rest[R::kStep];
  Tail(const typename R::T* row, int64_t at, int64_t width) {
    __builtin_memset(rest, 0, sizeof rest);
    __builtin_memcpy(rest, row + at, size_t(width - at) * sizeof(typename R::T));
  }
};

// sums[m][n] = rows[m] . x[n]
template <class R, int M, int N>
inline void dot_block(const typename R::T* const* rows, const typename R::Input* const* x, const float* const* scale, int64_t width,
                      typename R::Sum (*sums)[N]) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = R::none();
  const int64_t whole = width / R::kStep * R::kStep, span = R::kSpans ? kSpan : whole + 1;
  int64_t s = 0;
  for (int64_t begin = 0; begin < whole; begin += span, ++s) {
    const int64_t end = begin + span < whole ? begin + span : whole;
    for (int64_t i = begin; i < end; i += R::kStep)
      for (int n = 0; n < N; ++n) {
        const auto part = R::input(x[n] + i);
        for (int m = 0; m < M; ++m) R::dot(sums[m][n], rows[m] + i, part);
      }
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) R::flush(sums[m][n], scale[n][s]);
  }
  if (whole == width) return;
  for (int m = 0; m < M; ++m) {
    const Tail<R> tail(rows[m], whole, width);
    for (int n = 0; n < N; ++n) {
      R::dot(sums[m][n], tail.rest, R::input(x[n] + whole));
      R::flush(sums[m][n], scale[n][whole / kSpan]);
    }
  }
}

// y[n] += the sum over m of h[m][n] rows[m]
template <class R, int M, int N>
inline void add_block(const typename R::T* const* rows, const F (*h)[N], int64_t width, float* const* y) {
  const int64_t whole = width / R::kStep * R::kStep;
  for (int64_t i = 0; i < whole; i += R::kStep)
    for (int n = 0; n < N; ++n) {
      auto part = R::output(y[n] + i);
      for (int m = 0; m < M; ++m) R::axpy(part, h[m][n], rows[m] + i);
      R::put(y[n] + i, part);
    }
  if (whole == width) return;
  for (int m = 0; m < M; ++m) {
    const Tail<R> tail(rows[m], whole, width);
    for (int n = 0; n < N; ++n) {
      auto part = R::output(y[n] + whole);
      R::axpy(part, h[m][n], tail.rest);
      R::put(y[n] + whole, part);
    }
  }
}

// The two above at once, one token and different rows: six rows come from memory side by side, and hardware fetches ahead in each.
template <class R>
inline void dot_and_add(const typename R::T* const* rows, const typename R::Input* x, const float* scale, int64_t width,
                        typename R::Sum (*sums)[1], const typename R::T* const* down, const F* h, float* y) {
  for (int m = 0; m < 4; ++m) sums[m][0] = R::none();
  const int64_t whole = width / R::kStep * R::kStep, span = R::kSpans ? kSpan : whole + 1;
  int64_t s = 0;
  for (int64_t begin = 0; begin < whole; begin += span, ++s) {
    const int64_t end = begin + span < whole ? begin + span : whole;
    for (int64_t i = begin; i < end; i += R::kStep) {
      const auto part = R::input(x + i);
      for (int m = 0; m < 4; ++m) R::dot(sums[m][0], rows[m] + i, part);
      auto out = R::output(y + i);
      for (int m = 0; m < 2; ++m) R::axpy(out, h[m], down[m] + i);
      R::put(y + i, out);
    }
    for (int m = 0; m < 4; ++m) R::flush(sums[m][0], scale[s]);
  }
  if (whole == width) return;
  for (int m = 0; m < 4; ++m) {
    const Tail<R> tail(rows[m], whole, width);
    R::dot(sums[m][0], tail.rest, R::input(x + whole));
    R::flush(sums[m][0], scale[whole / kSpan]);
  }
  auto out = R::output(y + whole);
  for (int m = 0; m < 2; ++m) {
    const Tail<R> tail(down[m], whole, width);
    R::axpy(out, h[m], tail.rest);
  }
  R::put(y + whole, out);
}
