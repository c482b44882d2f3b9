#include "common.h"

template <typename T>
static void run(T* out, const T* x, int64_t rows, int64_t dim) {
  team(rows * dim * (int64_t)sizeof(T), [=] {
#pragma omp for
    for (int64_t t = 0; t < rows; t++) {
      const T *gate = x + t * 2 * dim, *up = gate + dim;
      T* y = out + t * dim;
      int64_t i = 0;
      for (; i + L <= dim; i += L) {
        vf g = load(gate + i), e = exp_((vf)((vi)g | (int32_t)0x80000000));  // e^-|g|
        vi positive = g >= 0.0f;
        vf top = (vf)(((vi)splat(1.0f) & positive) | ((vi)e & ~positive));
        store(y + i, g * (top / (1.0f + e)) * load(up + i));
      }
      for (; i < dim; i++) {
        float g = widen(gate[i]);
        narrow(y + i, g / (1.0f + __builtin_expf(-g)) * widen(up[i]));
      }
    }
  });
}

EXPORT void llmd_silu_mul(void* out, const void* x, int64_t rows, int64_t dim, int64_t dtype) {
  if (dtype == BF16)
    run((bf16*)out, (const bf16*)x, rows, dim);
  else
    run((float*)out, (const float*)x, rows, dim);
}
REPLAYABLE(llmd_silu_mul)
