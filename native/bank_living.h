// The living channels of `bank_ffn`: their rows of gate, up and down. Included by bank_kernels.h.

template <class R>
struct Living {
  using T = typename R::T;
  using Input = typename R::Input;
  const Ffn& w;
  const Live* live;
  const float* coefficient;  // [count, tokens] or null
  int64_t count;
  const Inputs& x;
  int64_t tokens;
  float* y;
  int64_t width, row_bytes;

  const T* row(const Rows& of, int64_t i) const { return static_cast<const T*>(of.data) + live[i].channel * width; }
  const Input* input(int64_t t) const { return static_cast<const Input*>(x.data) + t * x.stride; }
  float scaled(const Rows& of, int64_t i, float a) const { return of.scale ? a * of.scale[live[i].channel] : a; }
  // What the down row of the i-th living channel is multiplied by.
  float hidden(int64_t i, int64_t t, float gate, float up) const {
    const float h = activate(w.act, scaled(w.gate, i, gate)) * scaled(w.up, i, up);
    return scaled(w.down, i, coefficient ? h * coefficient[i * tokens + t] : h);
  }

  // Two channels at a time, and beside them the down rows of the two before.
  void one_token() const {
    const T *down[2] = {nullptr, nullptr}, *rows[4];
    F h[2];
    typename R::Sum sums[4][1];
    const Input* inputs[1] = {input(0)};
    const float* scales[1] = {x.scale};
    for (int64_t i = 0; i < count; i += 2) {
      const int64_t pair[2] = {i, i + 1 < count ? i + 1 : i};
      for (int m = 0; m < 2; ++m) {
        rows[m] = row(w.gate, pair[m]);
        rows[2 + m] = row(w.up, pair[m]);
        start(row(w.down, pair[m]), row_bytes);
        if (i + 2 + m < count) {
          start(row(w.gate, i + 2 + m), row_bytes);
          start(row(w.up, i + 2 + m), row_bytes);
        }
      }
      if (down[0]) dot_and_add<R>(rows, inputs[0], scales[0], width, sums, down, h, y);
      else dot_block<R, 4, 1>(rows, inputs, scales, width, sums);
      for (int m = 0; m < 2; ++m) {
        down[m] = row(w.down, pair[m]);
        h[m] = i + m < count ? set1(hidden(i + m, 0, sum(sums[m][0].total), sum(sums[2 + m][0].total))) : zero();
      }
    }
    if (!down[0]) return;
    const F last[2][1] = {{h[0]}, {h[1]}};
    add_block<R, 2, 1>(down, last, width, &y);
  }

  template <int N>
  void some_tokens(int64_t i, const int* which) const {
    const T *rows[2] = {row(w.gate, i), row(w.up, i)}, *down[1] = {row(w.down, i)};
    const Input* inputs[N];
    const float* scales[N];
    float* outputs[N];
    for (int n = 0; n < N; ++n) {
      inputs[n] = input(which[n]);
      scales[n] = x.scale + which[n] * x.spans;
      outputs[n] = y + which[n] * x.stride;
    }
    typename R::Sum sums[2][N];
    dot_block<R, 2, N>(rows, inputs, scales, width, sums);
    F h[1][N];
    for (int n = 0; n < N; ++n) h[0][n] = set1(hidden(i, which[n], sum(sums[0][n].total), sum(sums[1][n].total)));
    add_block<R, 1, N>(down, h, width, outputs);
  }

  void run() const {
    if (tokens == 1) return one_token();
    for (int64_t i = 0; i < count; ++i) {
      start(row(w.down, i), row_bytes);
      if (i + 1 < count) {
        start(row(w.gate, i + 1), row_bytes);
        start(row(w.up, i + 1), row_bytes);
      }
      int which[kMostTokens], n = 0, done = 0;
      for (uint32_t bits = live[i].tokens; bits; bits &= bits - 1) which[n++] = __builtin_ctz(bits);
      for (; done + 4 <= n; done += 4) some_tokens<4>(i, which + done);
      for (; done + 2 <= n; done += 2) some_tokens<2>(i, which + done);
      if (done < n) some_tokens<1>(i, which + done);
    }
  }
};

template <class R>
inline void ffn_of(const Ffn& w, const Live* live, const float* coefficient, int64_t count, const Inputs& x, int64_t tokens, float* y) {
  Living<R>{w, live, coefficient, count, x, tokens, y, w.gate.width, w.gate.width * int64_t(sizeof(typename R::T))}.run();
}

inline void ffn(const Ffn& w, const Live* live, const float* coefficient, int64_t count, const Inputs& x, int64_t tokens, float* y) {
  if (w.gate.type == kBf16) ffn_of<Bf16Row>(w, live, coefficient, count, x, tokens, y);
  else if (w.gate.type == kInt8) ffn_of<Int8Row>(w, live, coefficient, count, x, tokens, y);
  else ffn_of<FloatRow>(w, live, coefficient, count, x, tokens, y);
}

inline void put(float value, void* out, int64_t i, bool out_bf16) {
  if (out_bf16) from_float(value, static_cast<bf16*>(out) + i);
  else from_float(value, static_cast<float*>(out) + i);
}

inline void collect(int type, const float* y, int64_t parts, int64_t part_stride, int64_t width, int64_t begin, int64_t end, void* out,
                    bool out_bf16) {
  float block[2 * W];
  for (int64_t b = begin; b < end; b += 2 * W) {
    F first = load(y + b), second = load(y + b + W);
    for (int64_t p = 1; p < parts; ++p) {
      first = add(first, load(y + p * part_stride + b));
      second = add(second, load(y + p * part_stride + b + W));
    }
    store(block, first);
    store(block + W, second);
    const int64_t n = least(2 * W, least(end, width) - b);
    for (int64_t i = 0; i < n; ++i) put(block[type == kBf16 ? i % 2 * W + i / 2 : i], out, b + i, out_bf16);
  }
}
