// Keys and values into their slots of the cache, alone or with what comes before: heads of q and k are normalised where a
// model does so and turned by their position, q's in place, k's too on their way to the cache.
#include "lines.h"

struct Args {
  const int64_t* slots;
  int64_t tokens, heads, dim, block_size, k_stride, v_stride, block_stride, scale_stride;  // heads: of k and v
};

struct Turn {
  const int64_t* positions;
  const float* cos_sin;
  const void *q_weight, *k_weight;  // null: not normalised
  float eps;
  int64_t rot, max_position, q_heads, q_stride;
};

template <typename S, typename T>
static void copy(T* to, const S* from, int64_t n) {
  for (int64_t i = 0; i < n; i += L) store_some(to + i, load_some(from + i, n - i), n - i);
}
template <typename T>
static void copy(T* to, const T* from, int64_t n) { memcpy(to, from, n * sizeof(T)); }

// One head in eight bits, as in quantized_kv: the scale in bfloat16, rounded so that nothing exceeds the limit.
template <typename S, typename T>
static void quantize(T* to, bf16* scale, const S* from, int64_t dim, float limit) {
  vi top = vi{};  // of the bits of |x|, which are ordered as the numbers
  vf broken = vf{};
  for (int64_t d = 0; d < dim; d += L) {
    vf x = load_some(from + d, dim - d);
    vi size = (vi)x & 0x7fffffff, more = size > top;
    top = (size & more) | (top & ~more);
    broken += x * 0.0f;
  }
  float sizes[L], most = 0;
  store(sizes, (vf)top);
  for (int i = 0; i < L; i++) most = sizes[i] > most ? sizes[i] : most;
  narrow(scale, most * (1.00390625f / limit) + sum(broken));
  const float kept = widen(*scale), inverse = kept > 1e-30f ? 1.0f / kept : 0.0f;
  for (int64_t d = 0; d < dim; d += L) {
    vf x = load_some(from + d, dim - d) * inverse;
    x = (vf)((vi)x & (x == x));  // of a broken head, whose scale tells
    store_some(to + d, x, dim - d);
  }
}

// Where a launch writes: keys and values, and their scales where the cache is of eight bits.
template <typename T>
struct Cache {
  T *keys, *values;
  bf16 *key_scales, *value_scales;
};

// Heads [first, first + count) of one token.
template <typename S, typename T>
static inline void put(const Args& g, const Cache<T>& to, const S* k, const S* v, int64_t token, int64_t first, int64_t count) {
  const int64_t block = g.slots[token] / g.block_size, offset = g.slots[token] % g.block_size;
  const int64_t at = block * g.block_stride + (offset * g.heads + first) * g.dim;
  k += token * g.k_stride + first * g.dim, v += token * g.v_stride + first * g.dim;
  if constexpr (sizeof(T) > 1) {
    copy(to.keys + at, k, count * g.dim);
    copy(to.values + at, v, count * g.dim);
  } else {
    const int64_t line = block * g.scale_stride + offset * g.heads + first;
    const float limit = std::is_same<T, e4m3>::value ? 448.0f : 127.0f;
    for (int64_t h = 0; h < count; h++) {
      quantize(to.keys + at + h * g.dim, to.key_scales + line + h, k + h * g.dim, g.dim, limit);
      quantize(to.values + at + h * g.dim, to.value_scales + line + h, v + h * g.dim, g.dim, limit);
    }
  }
}

template <typename S, typename T>
static void run(const Args& g, const S* k, const S* v, const Cache<T>& to) {
  team(g.tokens * g.heads * g.dim * 2 * (int64_t)sizeof(T), [=] {
#pragma omp for
    for (int64_t t = 0; t < g.tokens; t++) put(g, to, k, v, t, 0, g.heads);
  });
}

template <typename S, typename T>
static void run(const Args& g, const Turn& by, S* q, S* k, const S* v, const Cache<T>& to) {
  const int64_t all = by.q_heads + g.heads;
  team(g.tokens * all * g.dim * (int64_t)sizeof(S), [=] {
    const int64_t threads = omp_get_num_threads(), pieces = g.tokens < 4 * threads ? threads : 1;  // of a token
#pragma omp for
    for (int64_t i = 0; i < g.tokens * pieces; i++) {
      const int64_t token = i / pieces, piece = i % pieces;
      const float* cos = angles(by.cos_sin, by.positions[token], by.max_position, by.rot);
      for (int64_t h = all * piece / pieces; h < all * (piece + 1) / pieces; h++) {  // those of k come first
        S* head = h < g.heads ? k + token * g.k_stride + h * g.dim : q + token * by.q_stride + (h - g.heads) * g.dim;
        const S* weight = (const S*)(h < g.heads ? by.k_weight : by.q_weight);
        if (weight) normalise(head, head, weight, by.eps, g.dim);
        turn(head, cos, cos + by.rot / 2, by.rot / 2);
        if (h < g.heads) put(g, to, k, v, token, h, 1);
      }
    }
  });
}

template <class Run>
static void choose(void* keys, void* values, void* key_scales, void* value_scales, int64_t kv_dtype, Run run) {
#define TO(T) Cache<T>{(T*)keys, (T*)values, (bf16*)key_scales, (bf16*)value_scales}
  switch (kv_dtype) {
    case F32: return run(TO(float));
    case BF16: return run(TO(bf16));
    case I8: return run(TO(int8_t));
    case E4M3: return run(TO(e4m3));
  }
#undef TO
}

EXPORT void llmd_store_kv(const void* k, const void* v, void* keys, void* values, void* key_scales, void* value_scales,
                          const int64_t* slots, int64_t tokens, int64_t heads, int64_t dim, int64_t block_size,
                          int64_t k_stride, int64_t v_stride, int64_t block_stride, int64_t scale_stride, int64_t dtype,
                          int64_t kv_dtype) {
  const Args g{slots, tokens, heads, dim, block_size, k_stride, v_stride, block_stride, scale_stride};
  choose(keys, values, key_scales, value_scales, kv_dtype, [&](const auto& to) {
    dtype == BF16 ? run(g, (const bf16*)k, (const bf16*)v, to) : run(g, (const float*)k, (const float*)v, to);
  });
}
REPLAYABLE(llmd_store_kv)

EXPORT void llmd_rotary_store_kv(void* q, void* k, const void* v, void* keys, void* values, void* key_scales,
                                 void* value_scales, const int64_t* positions, const int64_t* slots, const float* cos_sin,
                                 const void* q_weight, const void* k_weight, float eps, int64_t tokens, int64_t q_heads,
                                 int64_t heads, int64_t dim, int64_t rot, int64_t max_position, int64_t block_size,
                                 int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t block_stride,
                                 int64_t scale_stride, int64_t dtype, int64_t kv_dtype) {
  const Args g{slots, tokens, heads, dim, block_size, k_stride, v_stride, block_stride, scale_stride};
  const Turn by{positions, cos_sin, q_weight, k_weight, eps, rot, max_position, q_heads, q_stride};
  choose(keys, values, key_scales, value_scales, kv_dtype, [&](const auto& to) {
    dtype == BF16 ? run(g, by, (bf16*)q, (bf16*)k, (const bf16*)v, to) : run(g, by, (float*)q, (float*)k, (const float*)v, to);
  });
}
REPLAYABLE(llmd_rotary_store_kv)
