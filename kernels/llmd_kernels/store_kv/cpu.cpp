#include "common.h"

struct Args {
  const int64_t* slots;
  int64_t tokens, heads, dim, block_size, k_stride, v_stride, block_stride, scale_stride;
};

template <typename S, typename T>
static void copy(T* to, const S* from, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load(from + i));
  for (; i < n; i++) narrow(to + i, widen(from[i]));
}
template <typename T>
static void copy(T* to, const T* from, int64_t n) { memcpy(to, from, n * sizeof(T)); }

template <typename S>
static inline vf load_some(const S* p, int64_t n) {
  if (n >= L) return load(p);
  float x[L] = {};
  for (int64_t i = 0; i < n; i++) x[i] = widen(p[i]);
  return load(x);
}

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
    if (d + L <= dim) {
      store(to + d, x);
    } else {
      T last[L];
      store(last, x);
      memcpy(to + d, last, dim - d);
    }
  }
}

template <typename S, typename T>
static void run(const Args& g, const S* k, const S* v, T* keys, T* values, bf16* key_scales, bf16* value_scales) {
  const int64_t width = g.heads * g.dim;
  team(g.tokens * width * 2 * (int64_t)sizeof(T), [=] {
#pragma omp for
    for (int64_t t = 0; t < g.tokens; t++) {
      const int64_t block = g.slots[t] / g.block_size, offset = g.slots[t] % g.block_size;
      const int64_t at = block * g.block_stride + offset * width;
      if constexpr (sizeof(T) > 1) {
        copy(keys + at, k + t * g.k_stride, width);
        copy(values + at, v + t * g.v_stride, width);
      } else {
        const int64_t line = block * g.scale_stride + offset * g.heads;
        const float limit = std::is_same<T, e4m3>::value ? 448.0f : 127.0f;
        for (int64_t h = 0; h < g.heads; h++) {
          quantize(keys + at + h * g.dim, key_scales + line + h, k + t * g.k_stride + h * g.dim, g.dim, limit);
          quantize(values + at + h * g.dim, value_scales + line + h, v + t * g.v_stride + h * g.dim, g.dim, limit);
        }
      }
    }
  });
}

template <typename S>
static void choose(const Args& g, const void* k, const void* v, void* keys, void* values, void* ks, void* vs, int64_t dtype) {
#define RUN(T) run(g, (const S*)k, (const S*)v, (T*)keys, (T*)values, (bf16*)ks, (bf16*)vs)
  switch (dtype) {
    case F32: return RUN(float);
    case BF16: return RUN(bf16);
    case I8: return RUN(int8_t);
    case E4M3: return RUN(e4m3);
  }
}

EXPORT void llmd_store_kv(const void* k, const void* v, void* keys, void* values, void* key_scales, void* value_scales,
                          const int64_t* slots, int64_t tokens, int64_t heads, int64_t dim, int64_t block_size,
                          int64_t k_stride, int64_t v_stride, int64_t block_stride, int64_t scale_stride, int64_t dtype,
                          int64_t kv_dtype) {
  const Args g{slots, tokens, heads, dim, block_size, k_stride, v_stride, block_stride, scale_stride};
  if (dtype == BF16)
    choose<bf16>(g, k, v, keys, values, key_scales, value_scales, kv_dtype);
  else
    choose<float>(g, k, v, keys, values, key_scales, value_scales, kv_dtype);
}
REPLAYABLE(llmd_store_kv)
