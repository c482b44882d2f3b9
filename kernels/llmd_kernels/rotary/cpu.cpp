#include "common.h"

template <typename T>
static void turn(T* head, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + L <= half; i += L) {
    vf a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
    store(head + i, a * c - b * s);
    store(head + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    float a = widen(head[i]), b = widen(head[half + i]);
    narrow(head + i, a * cos[i] - b * sin[i]);
    narrow(head + half + i, b * cos[i] + a * sin[i]);
  }
}

template <typename T>
static void run(T* q, T* k, const int64_t* positions, const float* cos_sin, int64_t tokens, int64_t heads,
                int64_t kv_heads, int64_t dim, int64_t rot, int64_t q_stride, int64_t k_stride, int64_t max_position) {
  team(tokens * (heads + kv_heads) * dim * (int64_t)sizeof(T), [=] {
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) {
      int64_t position = positions[t] < 0 ? 0 : positions[t] < max_position ? positions[t] : max_position - 1;
      const float *cos = cos_sin + position * rot, *sin = cos + rot / 2;
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
