// The decode kernel of `bank_ffn`: what its files share. bank.cpp drives threads and phases; bank_kernels.h holds the loops, compiled
// once per instruction set by bank_avx512vnni.cpp, bank_avx512.cpp, bank_avx2.cpp and bank_plain.cpp over the lanes that bank_lanes_*.h
// define. Not one body compiled three times as in simd.h: sums across lanes, bytes times bytes and masks have no portable spelling
// that compilers turn into the instruction there is for it.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fallow::bank {

enum Type : int { kFloat = 0, kBf16 = 1, kInt8 = 2 };
enum Kind : int { kLinear = 0, kBilinear = 1, kQuantized = 2, kScores = 3 };
enum Act : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };

constexpr int kMostTokens = 8;
constexpr int64_t kPad = 64;     // inputs are padded with zeros to a multiple of this
constexpr int64_t kSpan = 256;   // inputs of an int8 dot product that share a scale
constexpr int64_t kMostBank = 1024;

// Rows of `width` entries, `stride` entries apart; int8 ones have a scale each.
struct Rows {
  const void* data;
  const float* scale;
  int64_t width, stride;
  int type;
};

// T vectors in the form that dot products with rows of one type take (bank_kernels.h says which), `stride` entries apart.
struct Inputs {
  void* data;
  float* scale;
  int64_t stride, spans;
};

// A copy in few bits: [blocks of 16 channels][groups][gate, up], as pack.py lays it out.
struct Codes {
  const uint8_t* codes;
  const bf16* scales;
  int64_t groups, group;
  int bits;
};
// T inputs rounded to 8 bits: bytes in the order of the codes, and per group a scale and minus the zero point times the sum.
struct CodedInputs {
  int8_t* bytes;
  float *scale, *offset;
};

// A channel that lives for a token.
struct Live {
  int32_t channel, token;
};

struct Ffn {
  Rows gate, up, down;
  int act;
};

struct Kernels {
  int lanes;
  void (*prepare)(int type, const float* x, int64_t width, int64_t tokens, const Inputs& to);
  // out[t * out_stride + r] = rows[first + r] . x[t]
  void (*dots)(const Rows& rows, int64_t first, int64_t count, const Inputs& x, int64_t tokens, float* out, int64_t out_stride);
  void (*round)(const float* x, int64_t width, int64_t tokens, const Codes& c, const CodedInputs& to);
  // gate and up [t * out_stride + 16 * (b - first_block) + lane] of some blocks of 16 channels
  void (*coded_dots)(const Codes& c, int64_t first_block, int64_t blocks, const CodedInputs& x, int64_t tokens, float* gate, float* up,
                     int64_t out_stride);
  // s = |act(gate) * up| * tilt, or s + tilt with up null; tilt may be null
  void (*magnitude)(int act, float* gate_s, const float* up, const float* tilt, int64_t n);
  void (*sigmoid2)(const float* s, float* out, int64_t n);  // 2 sigmoid(s)
  // The `keep` best of s [bank]: their places, rising. keys: room for `bank`.
  void (*select)(const float* s, int64_t bank, int64_t keep, int32_t* keys, uint16_t* places);
  void (*mask)(const float* s, int64_t banks, int64_t bank, int64_t keep, uint8_t* out);
  // y[token] += coefficient act(gate . x) (up . x) down for each of `count` live; coefficient may be null, y is laid out as x is
  void (*ffn)(const Ffn& w, const Live* live, const float* coefficient, int64_t count, const Inputs& x, float* y);
  // out = the sum of `parts` y's, `part_stride` apart, entries [begin, end) in natural order
  void (*collect)(int type, const float* y, int64_t parts, int64_t part_stride, int64_t width, int64_t begin, int64_t end, void* out,
                  bool out_bf16);
};

extern const Kernels plain_kernels;
#if FALLOW_X86
extern const Kernels avx2_kernels, avx512_kernels, avx512vnni_kernels;
#endif

FALLOW_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

}  // namespace fallow::bank
