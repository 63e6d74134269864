// Attention of one new token over a cache: softmax(scale q k^T) v over the places that the mask opens, keys and values read once for
// all query heads that share them. Torch's kernel reads the whole of a static cache, filled or not, and once per query head.
#include <limits>

#include "exp.h"
#include "lines.h"

namespace fallow {
namespace {

constexpr int kMostHeads = 8;                // query heads whose sums stay in registers
constexpr int64_t kAloneBytes = 1 << 19;     // below, a second thread costs more than it saves

struct Attention {
  const void *q, *k, *v;  // [B, H, d], [B, G, L, d], [B, G, L, d]; strides in entries, heads of q and out side by side
  const uint8_t* mask;    // [B or 1, L], or null
  void* out;              // [B, H, d]
  int64_t batch, heads, groups, length, dim, mask_stride;
  int64_t k_batch, k_group, k_row, v_batch, v_group, v_row;
  float scale;
};

// scores[h * live + i] = q[h] . k[place of i]
template <int N, class T>
FALLOW_INLINE void score(const float* q, const T* k, int64_t row, const std::vector<int32_t>& places, int64_t dim, float scale,
                         float* scores) {
  const int64_t live = int64_t(places.size());
  for (int64_t i = 0; i < live; ++i) {
    const T* key = k + places[size_t(i)] * row;
    Lanes sum[N] = {};
    for (int64_t d = 0; d < dim; d += kLine<T>) {
      Lanes first, second;
      split(key + d, &first, &second);
      for (int h = 0; h < N; ++h) sum[h] += dot_line<T>(first, second, q + h * dim + d);
    }
    for (int h = 0; h < N; ++h) scores[h * live + i] = scale * total(sum[h]);
  }
}

// out[h] = sum over i of scores[h * live + i] v[place of i]
template <int N, class T>
FALLOW_INLINE void mix(const float* scores, const T* v, int64_t row, const std::vector<int32_t>& places, int64_t dim, T* out) {
  const int64_t live = int64_t(places.size());
  for (int64_t d = 0; d < dim; d += kLine<T>) {
    Lanes first[N] = {}, second[N] = {};
    for (int64_t i = 0; i < live; ++i) {
      Lanes a, b;
      split(v + places[size_t(i)] * row + d, &a, &b);
      for (int h = 0; h < N; ++h) {
        first[h] += a * scores[h * live + i];
        if constexpr (kLine<T> > 16) second[h] += b * scores[h * live + i];
      }
    }
    for (int h = 0; h < N; ++h) join(first[h], second[h], out + h * dim + d);
  }
}

template <bool kFma>
FALLOW_INLINE void softmax(float* s, int64_t n) {
  float most = -std::numeric_limits<float>::infinity(), sum = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, s[i]);
  for (int64_t i = 0; i < n; ++i) s[i] = exp_nonpositive<kFma>(s[i] - most);
  for (int64_t i = 0; i < n; ++i) sum += s[i];
  for (int64_t i = 0; i < n; ++i) s[i] /= sum;
}

template <class T, int N>
struct Heads {
  template <bool kFma>
  FALLOW_INLINE static void run(const Attention* a, const float* q, const T* k, const T* v, const std::vector<int32_t>* places,
                                float* scores, T* out) {
    score<N>(q, k, a->k_row, *places, a->dim, a->scale, scores);
    for (int h = 0; h < N; ++h) softmax<kFma>(scores + h * int64_t(places->size()), int64_t(places->size()));
    mix<N>(scores, v, a->v_row, *places, a->dim, out);
  }
};

template <class T>
void some_heads(int n, const Attention* a, const float* q, const T* k, const T* v, const std::vector<int32_t>* places, float* scores,
                T* out) {
  switch (n) {
    case 1: return dispatch<Heads<T, 1>>(a, q, k, v, places, scores, out);
    case 2: return dispatch<Heads<T, 2>>(a, q, k, v, places, scores, out);
    case 3: return dispatch<Heads<T, 3>>(a, q, k, v, places, scores, out);
    case 4: return dispatch<Heads<T, 4>>(a, q, k, v, places, scores, out);
    case 5: return dispatch<Heads<T, 5>>(a, q, k, v, places, scores, out);
    case 6: return dispatch<Heads<T, 6>>(a, q, k, v, places, scores, out);
    case 7: return dispatch<Heads<T, 7>>(a, q, k, v, places, scores, out);
    default: return dispatch<Heads<T, 8>>(a, q, k, v, places, scores, out);
  }
}

template <class T>
void attend(const Attention& a, int n_threads) {
  std::vector<std::vector<int32_t>> places(size_t(a.mask && a.mask_stride ? a.batch : 1));
  for (size_t b = 0; b < places.size(); ++b)
    for (int64_t l = 0; l < a.length; ++l)
      if (!a.mask || a.mask[int64_t(b) * a.mask_stride + l]) places[b].push_back(int32_t(l));
  const int64_t per_group = a.heads / a.groups;
  const auto work = [&](int64_t piece) {
    const int64_t b = piece / a.groups, g = piece % a.groups;
    const std::vector<int32_t>& live = places[places.size() > 1 ? size_t(b) : 0];
    std::vector<float> q(size_t(kMostHeads * a.dim)), scores(size_t(kMostHeads) * std::max<size_t>(1, live.size()));
    for (int64_t h = 0; h < per_group; h += kMostHeads) {
      const int n = int(std::min<int64_t>(kMostHeads, per_group - h));
      const int64_t first = (b * a.heads + g * per_group + h) * a.dim;
      for (int64_t i = 0; i < n; ++i) spread(static_cast<const T*>(a.q) + first + i * a.dim, a.dim, q.data() + i * a.dim);
      some_heads<T>(n, &a, static_cast<const float*>(q.data()), static_cast<const T*>(a.k) + b * a.k_batch + g * a.k_group,
                    static_cast<const T*>(a.v) + b * a.v_batch + g * a.v_group, &live, scores.data(), static_cast<T*>(a.out) + first);
    }
  };
  const int64_t bytes = 2 * a.batch * a.groups * int64_t(places[0].size()) * a.dim * int64_t(sizeof(T));
  share_out(a.batch * a.groups, bytes < kAloneBytes ? 1 : n_threads, work);
}

}  // namespace
}  // namespace fallow

using namespace fallow;

// sizes: batch, heads, groups, length, dim, mask stride (0: one mask for all), then k's strides of batch, group and row, and v's.
// dim is a multiple of a line: 32 entries of bf16, 16 of fp32.
FALLOW_API void fallow_row_attention(const void* q, const void* k, const void* v, const uint8_t* mask, void* out, const int64_t* sizes,
                                     float scale, int is_bf16, int n_threads) {
  const Attention a{q,        k,        v,        mask,     out,      sizes[0],  sizes[1],  sizes[2], sizes[3],
                    sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], sizes[11], scale};
  if (is_bf16) attend<bf16>(a, n_threads);
  else attend<float>(a, n_threads);
}
