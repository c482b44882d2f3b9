#include "lines.h"

template <typename T>
static void run(T* q, T* k, const int64_t* positions, const float* cos_sin, int64_t tokens, int64_t heads,
                int64_t kv_heads, int64_t dim, int64_t rot, int64_t q_stride, int64_t k_stride, int64_t max_position) {
  team(tokens * (heads + kv_heads) * dim * (int64_t)sizeof(T), [=] {
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) {
      const float *cos = angles(cos_sin, positions[t], max_position, rot), *sin = cos + rot / 2;
      for (int64_t h = 0; h < heads; h++) turn(q + t * q_stride + h * dim, cos, sin, rot / 2);
      for (int64_t h = 0; h < kv_heads; h++) turn(k + t * k_stride + h * dim, cos, sin, rot / 2);
    }
  });
}

EXPORT void llmd_rotary(void* q, void* k, const int64_t* positions, const float* cos_sin, int64_t tokens, int64_t heads,
                        int64_t kv_heads, int64_t dim, int64_t rot, int64_t q_stride, int64_t k_stride,
                        int64_t max_position, int64_t dtype) {
  if (dtype == BF16)
    run((bf16*)q, (bf16*)k, positions, cos_sin, tokens, heads, kv_heads, dim, rot, q_stride, k_stride, max_position);
  else
    run((float*)q, (float*)k, positions, cos_sin, tokens, heads, kv_heads, dim, rot, q_stride, k_stride, max_position);
}
REPLAYABLE(llmd_rotary)
