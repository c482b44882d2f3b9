// Rows of W stay as the checkpoint has them. A panel of W is read from memory once and used for every row of x while it
// lies in the cache; 4 x 4 dot products at a time keep 16 accumulators busy.
#include "common.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr int64_t PANEL = 64;  // rows of W
constexpr int64_t BAND = 32;   // rows of x that stay in the cache with them

#ifdef __AVX512BF16__
constexpr int STEP = 32;  // elements of K at once
typedef __m512bh Some;
static inline Some take(const bf16* p) { return (Some)_mm512_loadu_si512(p); }
static inline Some take(const bf16* p, int64_t n) { return (Some)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
static inline vf dot(vf acc, Some a, Some b) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
#else
constexpr int STEP = L;
typedef vf Some;
static inline Some take(const bf16* p) { return load(p); }
static inline Some take(const bf16* p, int64_t n) {
  float x[L] = {};
  for (int64_t i = 0; i < n; i++) x[i] = widen(p[i]);
  return load(x);
}
static inline vf dot(vf acc, Some a, Some b) { return acc + a * b; }
#endif

template <int M, int N, typename T>
static void tile(T* out, int64_t out_stride, const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride,
                 const bf16* bias, int64_t depth) {
  vf acc[M * N];
  EACH(i, M * N) acc[i] = vf{}; END
  int64_t k = 0;
  for (; k + STEP <= depth; k += STEP) {
    Some b[N];
    EACH(n, N)
      b[n] = take(w + n * w_stride + k);
      __builtin_prefetch(w + (n + 2 * N) * w_stride + k, 0, 1);  // rows to come, into the second level
    END
    EACH(m, M)
      Some a = take(x + m * x_stride + k);
      EACH(n, N) acc[m * N + n] = dot(acc[m * N + n], a, b[n]); END
    END
  }
  if (k < depth) {
    Some b[N];
    EACH(n, N) b[n] = take(w + n * w_stride + k, depth - k); END
    EACH(m, M)
      Some a = take(x + m * x_stride + k, depth - k);
      EACH(n, N) acc[m * N + n] = dot(acc[m * N + n], a, b[n]); END
    END
  }
  EACH(i, M * N) narrow(out + i / N * out_stride + i % N, sum(acc[i]) + (bias ? widen(bias[i % N]) : 0)); END
}

template <int N, typename T>
static void rows(T* out, int64_t out_stride, const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride,
                 const bf16* bias, int64_t count, int64_t depth) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4)
    tile<4, N>(out + m * out_stride, out_stride, x + m * x_stride, x_stride, w, w_stride, bias, depth);
  out += m * out_stride, x += m * x_stride;
  switch (count - m) {
    case 3: tile<3, N>(out, out_stride, x, x_stride, w, w_stride, bias, depth); break;
    case 2: tile<2, N>(out, out_stride, x, x_stride, w, w_stride, bias, depth); break;
    case 1: tile<1, N>(out, out_stride, x, x_stride, w, w_stride, bias, depth); break;
  }
}

template <typename T>
static void run(T* out, const bf16* x, const bf16* w, const bf16* bias, int64_t count, int64_t width, int64_t depth,
                int64_t x_stride, int64_t w_stride) {
  team(width * depth * (int64_t)sizeof(bf16), [=] {
#pragma omp for schedule(dynamic, 1)
    for (int64_t panel = 0; panel < (width + PANEL - 1) / PANEL; panel++) {
      const int64_t begin = panel * PANEL, end = begin + PANEL < width ? begin + PANEL : width;
      for (int64_t m = 0; m < count; m += BAND) {
        const int64_t some = count - m < BAND ? count - m : BAND;
        int64_t n = begin;
        for (; n + 4 <= end; n += 4)
          rows<4>(out + m * width + n, width, x + m * x_stride, x_stride, w + n * w_stride, w_stride, bias ? bias + n : bias,
                  some, depth);
        for (; n < end; n++)
          rows<1>(out + m * width + n, width, x + m * x_stride, x_stride, w + n * w_stride, w_stride, bias ? bias + n : bias,
                  some, depth);
      }
    }
  });
}

EXPORT void llmd_linear(void* out, const bf16* x, const bf16* w, const bf16* bias, int64_t count, int64_t width,
                        int64_t depth, int64_t x_stride, int64_t w_stride, int64_t out_dtype) {
  if (out_dtype == BF16)
    run((bf16*)out, x, w, bias, count, width, depth, x_stride, w_stride);
  else
    run((float*)out, x, w, bias, count, width, depth, x_stride, w_stride);
}
REPLAYABLE(llmd_linear)
