#include "lines.h"

// y = x / sqrt(mean(x^2) + eps) * w; with a residual, x + residual is stored there and normalised as it was rounded.
template <typename T>
static void row(T* out, const T* x, T* residual, const T* w, float eps, int64_t dim) {
  if (residual)
    for (int64_t i = 0; i < dim; i += L)
      store_some(residual + i, load_some(residual + i, dim - i) + load_some(x + i, dim - i), dim - i);
  normalise(out, residual ? residual : x, w, eps, dim);
}

template <typename T>
static void run(T* out, const T* x, T* residual, const T* w, float eps, int64_t outer, int64_t outer_stride,
                int64_t inner, int64_t inner_stride, int64_t dim) {
  team(outer * inner * dim * (int64_t)sizeof(T), [=] {
#pragma omp for
    for (int64_t t = 0; t < outer; t++)
      for (int64_t h = 0; h < inner; h++)
        row(out + (t * inner + h) * dim, x + t * outer_stride + h * inner_stride,
            residual ? residual + t * outer_stride : nullptr, w, eps, dim);
  });
}

EXPORT void llmd_rms_norm(void* out, const void* x, void* residual, const void* w, float eps, int64_t outer,
                          int64_t outer_stride, int64_t inner, int64_t inner_stride, int64_t dim, int64_t dtype) {
  if (dtype == BF16)
    run((bf16*)out, (const bf16*)x, (bf16*)residual, (const bf16*)w, eps, outer, outer_stride, inner, inner_stride, dim);
  else
    run((float*)out, (const float*)x, (float*)residual, (const float*)w, eps, outer, outer_stride, inner, inner_stride, dim);
}
REPLAYABLE(llmd_rms_norm)
