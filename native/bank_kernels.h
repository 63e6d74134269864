// The loops of `bank_ffn`, for whichever lanes were included before; included once per instruction set, inside a namespace of its own.
// Nothing from the standard library: what it instantiates here could be linked into code for other CPUs.
#include "bank_rows.h"

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- inputs

// What makes the scale of a group with NaN or infinities NaN, where a largest entry alone would lose them.
inline float largest(const float* x, int64_t n) {
  float most = 0.0f, poison = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float a = x[i] < 0.0f ? -x[i] : x[i];
    most = a > most ? a : most;
    poison += x[i] * 0.0f;
  }
  return most + poison;
}

inline float to_even(float a) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (a + kShift) - kShift;
}

inline void prepare(int type, const float* x, int64_t width, int64_t tokens, const Inputs& to) {
  for (int64_t t = 0; t < tokens; ++t, x += width) {
    if (type == kInt8) {
      int16_t* out = static_cast<int16_t*>(to.data) + t * to.stride;
      for (int64_t s = 0; s * kSpan < width; ++s) {
        const int64_t begin = s * kSpan, n = least(kSpan, width - begin);
        const float scale = largest(x + begin, n) * (1.0f / 32767.0f), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        to.scale[t * to.spans + s] = scale;
        for (int64_t i = 0; i < n; ++i) {
          const float a = x[begin + i] * inverse;
          out[begin + i] = int16_t(to_even(a > 32767.0f ? 32767.0f : a < -32767.0f ? -32767.0f : a));
        }
      }
      __builtin_memset(out + width, 0, size_t(to.stride - width) * sizeof(int16_t));
      continue;
    }
    float* out = static_cast<float*>(to.data) + t * to.stride;
    if (type == kFloat) {
      __builtin_memcpy(out, x, size_t(width) * sizeof(float));
      __builtin_memset(out + width, 0, size_t(to.stride - width) * sizeof(float));
      continue;
    }
    for (int64_t b = 0; b < to.stride; b += 2 * W) {
      float block[2 * W] = {};
      __builtin_memcpy(block, x + b, size_t(least(2 * W, width > b ? width - b : 0)) * sizeof(float));
      for (int64_t i = 0; i < W; ++i) {
        out[b + i] = block[2 * i];
        out[b + W + i] = block[2 * i + 1];
      }
    }
  }
}

inline void round(const float* x, int64_t width, int64_t tokens, const Codes& c, const CodedInputs& to) {
  const float zero_point = float((1 << c.bits) - 1) / 2;
  for (int64_t t = 0; t < tokens; ++t, x += width)
    for (int64_t g = 0; g < c.groups; ++g) {
      const int64_t begin = g * c.group, n = least(c.group, width - begin);
      int8_t* out = to.bytes + (t * c.groups + g) * c.group;
      const float scale = largest(x + begin, n) / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      int32_t total = 0;
      for (int64_t i = 0; i < n; ++i) {
        const float a = to_even(x[begin + i] * inverse);
        out[i] = int8_t(a > 127.0f ? 127.0f : a < -127.0f ? -127.0f : a);
        total += out[i];
      }
      __builtin_memset(out + n, 0, size_t(c.group - n));
      to.scale[t * c.groups + g] = scale;
      to.offset[t * c.groups + g] = -zero_point * scale * float(total);
    }
}

// ---- scores

// The next M rows come after these.
// At most 48 lines asked for ahead, see `ask`.
template <class R, int M, int N>
inline void dots_block(const typename R::T* first, int64_t width, int64_t row_stride, const Inputs& x, int64_t t, float* out, int64_t out_stride) {
  const typename R::T *rows[M], *next[M];
  const typename R::Input* inputs[N];
  const float* scale[N];
  typename R::Sum sums[M][N];
  for (int m = 0; m < M; ++m) {
    rows[m] = first + m * row_stride;
    next[m] = rows[m] + M * row_stride;
  }
  for (int n = 0; n < N; ++n) {
    inputs[n] = static_cast<const typename R::Input*>(x.data) + (t + n) * x.stride;
    scale[n] = x.scale + (t + n) * x.spans;
  }
  sweep<R, M, N, 0, 384>(rows, next, inputs, scale, width, sums, nullptr, nullptr);
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; m += 4) {
      F four[4];
      float found[4];
      for (int i = 0; i < 4; ++i) four[i] = m + i < M ? sums[m + i < M ? m + i : m][n].total : zero();
      sum4(four, found);
      for (int i = 0; i < 4 && m + i < M; ++i) out[(t + n) * out_stride + m + i] = found[i];
    }
}

template <class R, int M>
inline void dots_rows(const typename R::T* first, const Rows& rows, const Inputs& x, int64_t tokens, float* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) dots_block<R, M, 4>(first, rows.width, rows.stride, x, t, out, out_stride);
  for (; t + 2 <= tokens; t += 2) dots_block<R, M, 2>(first, rows.width, rows.stride, x, t, out, out_stride);
  if (t < tokens) dots_block<R, M, 1>(first, rows.width, rows.stride, x, t, out, out_stride);
}

template <class R>
inline void dots_of(const Rows& rows, int64_t first, int64_t count, const Inputs& x, int64_t tokens, float* out, int64_t out_stride) {
  const auto* data = static_cast<const typename R::T*>(rows.data) + first * rows.stride;
  int64_t r = 0;
  for (; tokens == 1 && r + 8 <= count; r += 8) dots_block<R, 8, 1>(data + r * rows.stride, rows.width, rows.stride, x, 0, out + r, 0);
  for (; r + 4 <= count; r += 4) dots_rows<R, 4>(data + r * rows.stride, rows, x, tokens, out + r, out_stride);
  for (; r < count; ++r) dots_rows<R, 1>(data + r * rows.stride, rows, x, tokens, out + r, out_stride);
  if (rows.scale)
    for (int64_t t = 0; t < tokens; ++t)
      for (r = 0; r < count; ++r) out[t * out_stride + r] *= rows.scale[first + r];
}

inline void dots(const Rows& rows, int64_t first, int64_t count, const Inputs& x, int64_t tokens, float* out, int64_t out_stride) {
  if (rows.type == kBf16) dots_of<Bf16Row>(rows, first, count, x, tokens, out, out_stride);
  else if (rows.type == kInt8) dots_of<Int8Row>(rows, first, count, x, tokens, out, out_stride);
  else dots_of<FloatRow>(rows, first, count, x, tokens, out, out_stride);
}

constexpr int64_t kCodesAhead = 768;  // times four streams: what may be outstanding

// Some blocks of 16 channels side by side, as many streams from memory.
template <int kBits, int M, int N>
inline void coded_block(const Codes& c, int64_t block, const CodedInputs& x, int64_t t, float* const* out, int64_t out_stride) {
  constexpr int kParts = 16 / W;
  const int64_t bytes = 2 * c.group * kBits, row = c.groups * 2 * bytes, stride = c.groups * c.group;
  const uint8_t* codes[M];
  F total[2][M * N][kParts];
  for (int i = 0; i < 2 * M * N * kParts; ++i) total[0][0][i] = zero();
  for (int m = 0; m < M; ++m) codes[m] = c.codes + (block + m) * row;
  for (int64_t g = 0; g < c.groups; ++g)
    for (int which = 0; which < 2; ++which) {
      const bf16* scales = c.scales + (block * c.groups + g) * 32 + which * 16;
      if (t == 0)
        for (int m = 0; m < M; ++m) {
          for (int64_t line = 0; line < bytes; line += kLine) __builtin_prefetch(codes[m] + line + kCodesAhead, 0, 3);
          if (which) __builtin_prefetch(scales + m * c.groups * 32 + kCodesAhead / 4, 0, 3);
        }
      F sums[M * N][kParts];
      code_sums<kBits, M, N>(codes, c.group, x.bytes + t * stride + g * c.group, stride, sums);
      for (int m = 0; m < M; ++m) {
        codes[m] += bytes;
        for (int n = 0; n < N; ++n) {
          const int64_t at = (t + n) * c.groups + g;
          const F scale = set1(x.scale[at]), offset = set1(x.offset[at]);
          for (int p = 0; p < kParts; ++p)
            total[which][m * N + n][p] = fma(fma(sums[m * N + n][p], scale, offset), widen(scales + m * c.groups * 32 + p * W),
                                             total[which][m * N + n][p]);
        }
      }
    }
  for (int which = 0; which < 2; ++which)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        for (int p = 0; p < kParts; ++p) store(out[which] + (t + n) * out_stride + 16 * m + p * W, total[which][m * N + n][p]);
}

template <int kBits, int M>
inline void coded_tokens(const Codes& c, int64_t block, const CodedInputs& x, int64_t tokens, float* const* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) coded_block<kBits, M, 4>(c, block, x, t, out, out_stride);
  for (; t + 2 <= tokens; t += 2) coded_block<kBits, M, 2>(c, block, x, t, out, out_stride);
  if (t < tokens) coded_block<kBits, M, 1>(c, block, x, t, out, out_stride);
}

template <int kBits>
inline void coded_blocks(const Codes& c, int64_t first, int64_t blocks, const CodedInputs& x, int64_t tokens, float* gate, float* up,
                         int64_t out_stride) {
  for (int64_t b = 0; b < blocks;) {
    float* const out[2] = {gate + 16 * b, up + 16 * b};
    if (tokens == 1 && b + 4 <= blocks) {
      coded_block<kBits, 4, 1>(c, first + b, x, 0, out, out_stride);
      b += 4;
    } else {
      coded_tokens<kBits, 1>(c, first + b, x, tokens, out, out_stride);
      b += 1;
    }
  }
}

inline void coded_dots(const Codes& c, int64_t first, int64_t blocks, const CodedInputs& x, int64_t tokens, float* gate, float* up,
                       int64_t out_stride) {
  if (c.bits == 4) coded_blocks<4>(c, first, blocks, x, tokens, gate, up, out_stride);
  else coded_blocks<2>(c, first, blocks, x, tokens, gate, up, out_stride);
}

template <class A>
inline void hidden_of(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gate[i] = A::template value<kFma>(gate[i]) * up[i];
}

// gate = act(gate) * up
inline void hidden(int act, float* gate, const float* up, int64_t n) {
  switch (act) {
    case kSilu: return hidden_of<Silu>(gate, up, n);
    case kGelu: return hidden_of<Gelu>(gate, up, n);
    case kGeluTanh: return hidden_of<GeluTanh>(gate, up, n);
    case kRelu: return hidden_of<Relu>(gate, up, n);
    default: return hidden_of<Relu2>(gate, up, n);
  }
}

inline void magnitude(int act, float* gate, const float* up, const float* tilt, int64_t n) {
  if (up) {
    hidden(act, gate, up, n);
    for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] < 0.0f ? -gate[i] : gate[i];
    for (int64_t i = 0; tilt && i < n; ++i) gate[i] *= tilt[i];
  } else {
    for (int64_t i = 0; tilt && i < n; ++i) gate[i] += tilt[i];
  }
}

inline void sigmoid2(const float* s, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = 2.0f * sigmoid<kFma>(s[i]);
}

// ---- the best of a bank

// Floats as whole numbers of the same order; both zeros are one, NaN is minus infinity. Padded to whole vectors with less than any.
inline void make_keys(const float* s, int64_t bank, int32_t* keys) {
  constexpr int32_t kMinusInfinity = int32_t(0xff800000u) ^ 0x7fffffff;
  for (int64_t i = 0; i < bank; ++i) {
    const float a = s[i] + 0.0f;
    int32_t bits;
    __builtin_memcpy(&bits, &a, 4);
    bits ^= (bits >> 31) & 0x7fffffff;
    keys[i] = a == a ? bits : kMinusInfinity;
  }
  for (int64_t i = bank; i % 16; ++i) keys[i] = INT32_MIN;
}

inline int64_t count_above(const int32_t* keys, int64_t bank, int32_t t) {
  int64_t n = 0;
  for (int64_t i = 0; i < bank; i += W) n += __builtin_popcount(above(keys + i, t));
  return n;
}

struct Cut {
  int32_t threshold;  // what is above it lives
  int64_t ties;       // and so many that equal it, the first ones
};

// By halving the range of keys until exactly `keep` are above: about ten counts for scores that differ.
inline Cut cut(const int32_t* keys, int64_t bank, int64_t keep) {
  int32_t most = INT32_MIN, smallest = INT32_MAX;
  for (int64_t i = 0; i < bank; ++i) {
    most = keys[i] > most ? keys[i] : most;
    smallest = keys[i] < smallest ? keys[i] : smallest;
  }
  int64_t low = int64_t(smallest) - 1, high = most, above_high = 0;  // more than `keep` above low (or all), fewer above high
  if (keep >= bank) return {int32_t(low), 0};
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2, n = count_above(keys, bank, int32_t(middle));
    if (n == keep) return {int32_t(middle), 0};
    if (n > keep) {
      low = middle;
    } else {
      high = middle;
      above_high = n;
    }
  }
  return {int32_t(high), keep - above_high};
}

inline void select(const float* s, int64_t bank, int64_t keep, int32_t* keys, uint16_t* places) {
  make_keys(s, bank, keys);
  Cut c = cut(keys, bank, keep);
  for (int64_t i = 0; i < bank; i += W) {
    uint32_t bits = above(keys + i, c.threshold);
    if (c.ties) {
      for (uint32_t equal = above(keys + i, c.threshold - 1) & ~bits; equal && c.ties; equal &= equal - 1, --c.ties)
        bits |= equal & (0u - equal);
    }
    for (; bits; bits &= bits - 1) *places++ = uint16_t(i + __builtin_ctz(bits));
  }
}

inline void mask(const float* s, int64_t banks, int64_t bank, int64_t keep, uint8_t* out) {
  int32_t keys[kMostBank + 16];
  for (int64_t b = 0; b < banks; ++b, s += bank, out += bank) {
    make_keys(s, bank, keys);
    Cut c = cut(keys, bank, keep);
    for (int64_t i = 0; i < bank; ++i) out[i] = keys[i] > c.threshold;
    for (int64_t i = 0; c.ties; ++i)
      if (keys[i] == c.threshold) out[i] = 1, --c.ties;
  }
}

#include "bank_living.h"
