// The living channels of `bank_ffn`: their rows of gate, up and down. Included by bank_kernels.h.

// Four channels of one token at a time: their rows of gate and up, and beside them the down rows of the four before, twelve streams
// from memory that hardware follows by itself once it has seen a few lines of each. With six (two channels) y is read and written twice
// as often, and that is what limits then: it does not stay in the first-level cache beside the rows (12.5 of 16 GB/s, here 14.5).
template <class R>
struct Living {
  using T = typename R::T;
  static constexpr int kGroup = 4, kAhead = 256;  // four, as sum4 has it
  const Ffn& w;
  const Live* live;
  const float* coefficient;  // [count] or null
  int64_t count;
  const Inputs& x;
  float* y;

  static const T* row(const Rows& of, int64_t i) { return static_cast<const T*>(of.data) + i * of.stride; }

  // The living channels from `at` on that go together: `n` of them, filled up with the first.
  struct Group {
    int64_t at, n;
    const T* rows[3 * kGroup];
  };
  Group group(int64_t at) const {
    Group g{at, 0, {}};
    while (g.n < kGroup && at + g.n < count && live[at + g.n].token == live[at].token) ++g.n;
    for (int k = 0; k < kGroup && g.n > 0; ++k) {
      const int64_t channel = live[k < g.n ? at + k : at].channel;
      g.rows[k] = row(w.gate, channel);
      g.rows[kGroup + k] = row(w.up, channel);
      g.rows[2 * kGroup + k] = row(w.down, channel);
    }
    return g;
  }
  // What the group's down rows are multiplied by: nothing for those that only fill it up.
  void multipliers(const Group& g, const typename R::Sum (*sums)[1], F* h) const {
    F total[2 * kGroup];
    float gate[kGroup], up[kGroup];
    for (int k = 0; k < 2 * kGroup; ++k) total[k] = sums[k][0].total;
    sum4(total, gate);
    sum4(total + kGroup, up);
    if (w.gate.scale)
      for (int k = 0; k < g.n; ++k) {
        gate[k] *= w.gate.scale[live[g.at + k].channel];
        up[k] *= w.up.scale[live[g.at + k].channel];
      }
    hidden(w.act, gate, up, kGroup);
    for (int k = 0; k < kGroup; ++k) {
      if (k < g.n && w.down.scale) gate[k] *= w.down.scale[live[g.at + k].channel];
      if (k < g.n && coefficient) gate[k] *= coefficient[g.at + k];
      h[k] = k < g.n ? set1(gate[k]) : zero();
    }
  }

  void run() const {
    if (count == 0) return;
    const T *rows[3 * kGroup], *next[3 * kGroup];
    F h[kGroup];
    float* before = nullptr;
    typename R::Sum sums[2 * kGroup][1];
    Group now = group(0);
    while (now.n > 0) {
      const int64_t token = live[now.at].token;
      const Group then = group(now.at + now.n);
      const typename R::Input* input = static_cast<const typename R::Input*>(x.data) + token * x.stride;
      const float* scale = x.scale + token * x.spans;
      for (int k = 0; k < 2 * kGroup; ++k) {
        rows[k] = now.rows[k];
        next[k] = then.n > 0 ? then.rows[k] : now.rows[k];
      }
      for (int k = 2 * kGroup; k < 3 * kGroup; ++k) next[k] = now.rows[k];
      if (before) sweep<R, 2 * kGroup, 1, kGroup, kAhead>(rows, next, &input, &scale, w.gate.width, sums, h, before);
      else sweep<R, 2 * kGroup, 1, 0, kAhead>(rows, next, &input, &scale, w.gate.width, sums, nullptr, nullptr);
      for (int k = 2 * kGroup; k < 3 * kGroup; ++k) rows[k] = now.rows[k];
      multipliers(now, sums, h);
      before = y + token * x.stride;
      now = then;
    }
    const typename R::T* const* down = rows + 2 * kGroup;
    sweep<R, 0, 1, kGroup, kAhead>(down, down, nullptr, nullptr, w.gate.width, sums, h, before);
  }
};

template <class R>
inline void ffn_of(const Ffn& w, const Live* live, const float* coefficient, int64_t count, const Inputs& x, float* y) {
  Living<R>{w, live, coefficient, count, x, y}.run();
}

inline void ffn(const Ffn& w, const Live* live, const float* coefficient, int64_t count, const Inputs& x, float* y) {
  if (w.gate.type == kBf16) ffn_of<Bf16Row>(w, live, coefficient, count, x, y);
  else if (w.gate.type == kInt8) ffn_of<Int8Row>(w, live, coefficient, count, x, y);
  else ffn_of<FloatRow>(w, live, coefficient, count, x, y);
}

inline void collect(int type, const float* y, int64_t parts, int64_t part_stride, int64_t width, int64_t begin, int64_t end, void* out,
                    bool out_bf16) {
  float block[2 * W], in_order[2 * W];
  for (int64_t b = begin; b < end; b += 2 * W) {
    F first = load(y + b), second = load(y + b + W);
    for (int64_t p = 1; p < parts; ++p) {
      first = add(first, load(y + p * part_stride + b));
      second = add(second, load(y + p * part_stride + b + W));
    }
    store(block, first);
    store(block + W, second);
    for (int64_t i = 0; i < W; ++i) {
      in_order[2 * i] = block[type == kBf16 ? i : 2 * i];
      in_order[2 * i + 1] = block[type == kBf16 ? W + i : 2 * i + 1];
    }
    bf16 rounded[2 * W];
    for (int64_t i = 0; i < 2 * W; ++i) from_float(in_order[i], rounded + i);
    const int64_t n = least(2 * W, least(end, width) - b);
    if (n <= 0) return;
    if (out_bf16) __builtin_memcpy(static_cast<bf16*>(out) + b, rounded, size_t(n) * sizeof(bf16));
    else __builtin_memcpy(static_cast<float*>(out) + b, in_order, size_t(n) * sizeof(float));
  }
}
