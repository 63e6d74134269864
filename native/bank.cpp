// y = the sum over living channels of gate(s) act(x . w_gate) (x . w_up) w_down for up to 8 tokens, where the predictor's scores s choose
// `keep` of every `bank` channels. One parallel region: V x, a barrier, then chunks of banks that threads take one after the other
// (scores, the best of each bank, living rows into a y of the chunk's own), a barrier, and the sum of the y's. Chunks shrink towards the
// end, so that threads finish together, and do not depend on the number of threads (up to 8), so neither do the bits of y.
// A chunk's scores come before its rows: its part of the predictor is one stream through memory, and the addresses of all rows are
// known ahead. A compensation, y += U' (V' x) + b', goes along: V' x is among the first pieces of work, and U' z is computed by whoever
// sums that part of y. Bound by memory: keep/bank of the FFN's bytes plus the predictor's. A dense GEMM per half and a mask read all of them.
#include "arena.h"
#include "bank.h"
#include "team.h"

namespace fallow::bank {

// Fields in the order of `BankCall` in ops/native.py.
struct Call {
  const void* x;
  void* y;
  int64_t tokens, width, channels, bank, keep;
  const void *gate, *up, *down;
  int64_t gate_stride, up_stride, down_stride;
  const float *gate_scale, *up_scale, *down_scale;
  const void* factors[4];  // V and U of the gate (or of the logits), V and U of up; codes and scales; or scores
  const float* factor_scales[4];
  int64_t rank, groups, group;
  const float* tilt;
  const void *stand_v, *stand_u;  // the compensation's [stand_rank, width] and [width, stand_rank] in the type of x, or null
  const float* stand_bias;
  int64_t stand_rank;
  float* scores;  // [tokens, channels], or null: where only scores are asked for (of any number of tokens), and not y
  int32_t x_bf16, type, act, kind, factor_type, bits, smooth, n_threads, level;
};

namespace {

const Kernels& kernels(int level) {
#if FALLOW_X86
  const bool vnni = isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni");
  const int top = vnni ? 3 : int(isa()), use = level < 0 ? top : std::min(level, top);
  if (use == 3) return avx512vnni_kernels;
  if (use == 2) return avx512_kernels;
  if (use == 1) return avx2_kernels;
#endif
  return plain_kernels;
}

Arena& shared_arena() {
  static thread_local Arena arena;
  return arena;
}
Arena& own_arena() {
  static thread_local Arena arena;
  return arena;
}

// Channels within which the living ones of one token come after those of another: rows that both want are still in the cache then.
constexpr int64_t kWindow = 64;

constexpr int64_t kSmallest = 128 << 10;  // bytes of living rows for which a chunk is worth its start

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t input_bytes(int type) { return type == kInt8 ? 2 : 4; }

struct Plan {
  const Call& c;
  const Kernels& k;
  int64_t unit, most_live, y_stride;
  std::vector<int64_t> starts;  // of chunks, in units, and the end of the last
  int halves;                   // factors of the predictor: 0, 1 or 2 pairs
  int stand_type;

  Plan(const Call& c) : c(c), k(kernels(c.level)) {
    unit = c.bank;
    while (unit < kWindow || (c.kind == kQuantized && unit % 16)) unit += c.bank;
    const int64_t units = ceil_div(c.channels, unit), share = std::max(8, c.n_threads), most = ceil_div(units, 2 * share);
    const int64_t bytes = 3 * (unit / c.bank) * c.keep * c.width * (c.type == kInt8 ? 1 : c.type == kBf16 ? 2 : 4);
    const int64_t least = std::max(ceil_div(units, 8 * share), ceil_div(kSmallest, bytes));
    starts.push_back(0);
    while (starts.back() < units) {
      const int64_t left = units - starts.back();
      starts.push_back(starts.back() + std::min(left, std::max(least, std::min(most, left / share))));
    }
    most_live = std::max(least, most) * (unit / c.bank) * c.keep * c.tokens;
    y_stride = padded(c.width);
    halves = c.kind == kLinear ? 1 : c.kind == kBilinear ? 2 : 0;
    stand_type = c.x_bf16 ? kBf16 : kFloat;
  }
  int64_t chunks() const { return int64_t(starts.size()) - 1; }
  Rows factor(int i) const {
    const int64_t width = i % 2 ? c.rank : c.width;
    return {c.factors[i], c.factor_scales[i], width, width, c.factor_type};
  }
  Rows stand_v() const { return {c.stand_v, nullptr, c.width, c.width, stand_type}; }
  Rows stand_u() const { return {c.stand_u, nullptr, c.stand_rank, c.stand_rank, stand_type}; }
  Codes codes() const {
    return {static_cast<const uint8_t*>(c.factors[0]), static_cast<const bf16*>(c.factors[1]), c.groups, c.group, c.bits};
  }
};

Inputs take_inputs(Arena& arena, int type, int64_t width, int64_t tokens) {
  const int64_t stride = padded(width), spans = ceil_div(width, kSpan);
  char* data = arena.take<char>(tokens * stride * input_bytes(type));
  return {data, arena.take<float>(tokens * spans), stride, spans};
}
int64_t inputs_bytes(int64_t width, int64_t tokens) {
  return Arena::bytes<float>(tokens * padded(width)) + Arena::bytes<float>(tokens * ceil_div(width, kSpan));
}

// What one thread works with.
struct Worker {
  const Plan& p;
  const Call& c;
  const Kernels& k;
  float *x, *scores, *second, *coefficient, *stood;
  Inputs inputs, thin[2], z[2], stand, stand_z;
  CodedInputs coded;
  uint8_t* members;
  int32_t* keys;
  uint16_t* places;
  Live* live;

  explicit Worker(const Plan& p) : p(p), c(p.c), k(p.k) {
    Arena& arena = own_arena();
    const int64_t T = c.tokens, U = p.unit;
    arena.reserve(inputs_bytes(c.width, T) * 4 + inputs_bytes(c.rank, T) * 2 + inputs_bytes(c.stand_rank, T) +
                  Arena::bytes<float>(T * p.y_stride) + Arena::bytes<float>(T * U) * 2 + Arena::bytes<uint8_t>(U) +
                  Arena::bytes<int32_t>(U + 16) + Arena::bytes<uint16_t>(U) + Arena::bytes<Live>(p.most_live) +
                  Arena::bytes<float>(p.most_live) + Arena::bytes<int8_t>(T * c.groups * c.group) +
                  Arena::bytes<float>(T * c.groups) * 2);
    x = arena.take<float>(T * c.width);
    if (c.x_bf16)
      for (int64_t i = 0; i < T * c.width; ++i) x[i] = to_float(static_cast<const bf16*>(c.x)[i]);
    else
      std::memcpy(x, c.x, size_t(T * c.width) * sizeof(float));
    inputs = take_inputs(arena, c.type, c.width, T);
    k.prepare(c.type, x, c.width, T, inputs);
    thin[0] = inputs;
    if (p.halves && c.factor_type != c.type) {
      thin[0] = take_inputs(arena, c.factor_type, c.width, T);
      k.prepare(c.factor_type, x, c.width, T, thin[0]);
    }
    for (int i = 0; i < p.halves; ++i) z[i] = take_inputs(arena, c.factor_type, c.rank, T);
    if (c.stand_v) {
      stand = inputs;
      if (c.type != p.stand_type) {
        stand = take_inputs(arena, p.stand_type, c.width, T);
        k.prepare(p.stand_type, x, c.width, T, stand);
      }
      stand_z = take_inputs(arena, p.stand_type, c.stand_rank, T);
      stood = arena.take<float>(T * p.y_stride);
    }
    if (c.kind == kQuantized) {
      coded = {arena.take<int8_t>(T * c.groups * c.group), arena.take<float>(T * c.groups), arena.take<float>(T * c.groups)};
      k.round(x, c.width, T, p.codes(), coded);
    }
    scores = arena.take<float>(T * U);
    second = arena.take<float>(T * U);
    members = arena.take<uint8_t>(U);
    keys = arena.take<int32_t>(U + 16);
    places = arena.take<uint16_t>(U);
    live = arena.take<Live>(p.most_live);
    coefficient = arena.take<float>(p.most_live);
  }

  // Scores of channels [first, first + n) of all tokens, rows of `unit`.
  void score(int64_t first, int64_t n) {
    const int64_t T = c.tokens, U = p.unit;
    float* up = c.kind == kBilinear || c.kind == kQuantized ? second : nullptr;
    if (c.kind == kScores) {
      for (int64_t t = 0; t < T; ++t)
        std::memcpy(scores + t * U, static_cast<const float*>(c.factors[0]) + t * c.channels + first, size_t(n) * sizeof(float));
    } else if (c.kind == kQuantized) {
      k.coded_dots(p.codes(), first / 16, ceil_div(n, 16), coded, T, scores, second, U);
    } else {
      for (int i = 0; i < p.halves; ++i) k.dots(p.factor(2 * i + 1), first, n, z[i], T, i ? second : scores, U);
    }
    for (int64_t t = 0; t < T; ++t)
      k.magnitude(c.act, scores + t * U, up ? up + t * U : nullptr, c.tilt ? c.tilt + first : nullptr, n);
  }

  // Appends the living channels of one unit; returns how many there are now.
  int64_t choose(int64_t first, int64_t n, int64_t count) {
    const int64_t T = c.tokens, U = p.unit;
    if (T == 1) {
      for (int64_t b = 0; b < n; b += c.bank) {
        k.select(scores + b, c.bank, c.keep, keys, places);
        for (int64_t i = 0; i < c.keep; ++i, ++count) {
          live[count] = {int32_t(first + b + places[i]), 0};
          if (c.smooth) coefficient[count] = scores[b + places[i]];
        }
      }
      return count;
    }
    std::memset(members, 0, size_t(n));
    for (int64_t t = 0; t < T; ++t)
      for (int64_t b = 0; b < n; b += c.bank) {
        k.select(scores + t * U + b, c.bank, c.keep, keys, places);
        for (int64_t i = 0; i < c.keep; ++i) members[b + places[i]] |= uint8_t(1 << t);
      }
    for (int64_t begin = 0; begin < n; begin += kWindow)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t i = begin; i < std::min(n, begin + kWindow); ++i) {
          if (!(members[i] >> t & 1)) continue;
          live[count] = {int32_t(first + i), int32_t(t)};
          if (c.smooth) coefficient[count] = scores[t * U + i];
          ++count;
        }
    return count;
  }

  // Entries [begin, end) of the compensation, [begin, begin + kPad * n) of the part of y that it is; z = V' x.
  void compensate(const float* z, int64_t begin, int64_t end, float* y) {
    const int64_t T = c.tokens, n = std::min(end, c.width) - begin;
    if (n <= 0) return;
    k.prepare(p.stand_type, z, c.stand_rank, T, stand_z);
    k.dots(p.stand_u(), begin, n, stand_z, T, stood, n);
    for (int64_t t = 0; t < T; ++t) {
      float* row = stood + t * n;
      for (int64_t i = 0; i < n; ++i) row[i] += c.stand_bias[begin + i];
      // y of int8 rows is in natural order, else in that of the inputs
      k.prepare(c.type == kInt8 ? int(kFloat) : c.type, row, n, 1, {y + t * p.y_stride + begin, nullptr, end - begin, 0});
    }
  }

  void chunk(int64_t number, float* y) {
    int64_t count = 0;
    for (int64_t u = p.starts[number]; u < p.starts[number + 1]; ++u) {
      const int64_t first = u * p.unit, n = std::min(p.unit, c.channels - first);
      score(first, n);
      if (!c.scores) count = choose(first, n, count);
      for (int64_t t = 0; c.scores && t < c.tokens; ++t)
        std::memcpy(c.scores + t * c.channels + first, scores + t * p.unit, size_t(n) * sizeof(float));
    }
    if (c.smooth) k.sigmoid2(coefficient, coefficient, count);
    if (c.scores) return;
    std::memset(y, 0, size_t(c.tokens * p.y_stride) * sizeof(float));
    const Ffn w{{c.gate, c.gate_scale, c.width, c.gate_stride, c.type},
                {c.up, c.up_scale, c.width, c.up_stride, c.type},
                {c.down, c.down_scale, c.width, c.down_stride, c.type},
                c.act};
    k.ffn(w, live, c.smooth ? coefficient : nullptr, count, inputs, y);
  }
};

void run(const Call& c) {
  const Plan p(c);
  const int64_t T = c.tokens, part = c.scores ? 0 : T * p.y_stride, parts_count = p.chunks() + (c.stand_v ? 1 : 0);
  Arena& arena = shared_arena();
  arena.reserve(Arena::bytes<float>(2 * T * c.rank) + Arena::bytes<float>(T * c.stand_rank) + Arena::bytes<float>(parts_count * part));
  float *z = arena.take<float>(2 * T * c.rank), *stand_z = arena.take<float>(T * c.stand_rank);
  float *parts = arena.take<float>(parts_count * part), *stood = parts + p.chunks() * part;
  std::atomic<int64_t> next_rows{0}, next_chunk{0};
  with_team(c.n_threads, [&](Team& team, int thread) {
    Worker w(p);
    constexpr int64_t kRows = 16;
    const int64_t pieces = ceil_div(c.rank, kRows), before = pieces * p.halves, all = before + ceil_div(c.stand_rank, kRows);
    for (int64_t i; (i = next_rows++) < all;) {
      const bool stands = i >= before;
      const int half = stands ? 0 : int(i / pieces);
      const int64_t rank = stands ? c.stand_rank : c.rank;
      const int64_t first = (stands ? i - before : i % pieces) * kRows, n = std::min(kRows, rank - first);
      float* to = stands ? stand_z : z + half * T * c.rank;
      p.k.dots(stands ? p.stand_v() : p.factor(2 * half), first, n, stands ? w.stand : w.thin[0], T, to + first, rank);
    }
    if (p.halves) {
      team.wait();
      for (int i = 0; i < p.halves; ++i) p.k.prepare(c.factor_type, z + i * T * c.rank, c.rank, T, w.z[i]);
    }
    for (int64_t i; (i = next_chunk++) < p.chunks();) w.chunk(i, parts + i * part);
    if (c.scores) return;
    team.wait();
    const int64_t blocks = p.y_stride / kPad, begin = thread * blocks / team.size * kPad, end = (thread + 1) * blocks / team.size * kPad;
    if (c.stand_v) w.compensate(stand_z, begin, end, stood);
    const int64_t bytes = c.x_bf16 ? 2 : 4;
    for (int64_t t = 0; t < T && begin < end; ++t)
      p.k.collect(c.type, parts + t * p.y_stride, parts_count, part, c.width, begin, end, static_cast<char*>(c.y) + t * c.width * bytes, c.x_bf16);
  });
}

}  // namespace
}  // namespace fallow::bank

FALLOW_API void fallow_bank_ffn(const fallow::bank::Call* call) { fallow::bank::run(*call); }

// Scores [rows, banks * bank] to one byte each, 1 for the `keep` best of every bank.
FALLOW_API void fallow_bank_mask(const void* scores, uint8_t* out, int64_t rows, int64_t banks, int64_t bank, int64_t keep, int is_bf16,
                                 int n_threads, int level) {
  using namespace fallow;
  const bank::Kernels& k = bank::kernels(level);
  const int64_t pieces = std::min<int64_t>(rows * banks, 64 * n_threads);
  std::atomic<int64_t> next{0};
  with_team(n_threads, [&](Team&, int) {
    std::vector<float> wide(size_t(is_bf16 ? bank : 0));
    for (int64_t i; (i = next++) < pieces;) {
      const int64_t begin = i * rows * banks / pieces, end = (i + 1) * rows * banks / pieces;
      if (!is_bf16) {
        k.mask(static_cast<const float*>(scores) + begin * bank, end - begin, bank, keep, out + begin * bank);
        continue;
      }
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t j = 0; j < bank; ++j) wide[size_t(j)] = to_float(static_cast<const bf16*>(scores)[b * bank + j]);
        k.mask(wide.data(), 1, bank, keep, out + b * bank);
      }
    }
  });
}
