#include "common.h"

template <typename S, typename T>
static void copy(T* to, const S* from, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load(from + i));
  for (; i < n; i++) narrow(to + i, widen(from[i]));
}
template <typename T>
static void copy(T* to, const T* from, int64_t n) { memcpy(to, from, n * sizeof(T)); }

template <typename S, typename T>
static void run(const S* k, const S* v, T* keys, T* values, const int64_t* slots, int64_t tokens, int64_t width,
                int64_t block_size, int64_t k_stride, int64_t v_stride, int64_t block_stride) {
#pragma omp parallel for num_threads(threads()) if (tokens * width * 2 * (int64_t)sizeof(T) > PARALLEL_BYTES)
  for (int64_t t = 0; t < tokens; t++) {
    int64_t at = slots[t] / block_size * block_stride + slots[t] % block_size * width;
    copy(keys + at, k + t * k_stride, width);
    copy(values + at, v + t * v_stride, width);
  }
}

EXPORT void llmd_store_kv(const void* k, const void* v, void* keys, void* values, const int64_t* slots, int64_t tokens,
                          int64_t width, int64_t block_size, int64_t k_stride, int64_t v_stride, int64_t block_stride,
                          int64_t dtype, int64_t kv_dtype) {
#define RUN(S, T) run((const S*)k, (const S*)v, (T*)keys, (T*)values, slots, tokens, width, block_size, k_stride, v_stride, block_stride)
  if (dtype == BF16)
    kv_dtype == BF16 ? RUN(bf16, bf16) : RUN(bf16, float);
  else
    kv_dtype == BF16 ? RUN(float, bf16) : RUN(float, float);
}
