// The products of fp8.h, shared out among the threads.
#include "fp8.h"

using namespace fp8;

template void fp8::panel(const Work<bf16>&, int64_t, int64_t);
template void fp8::panel(const Work<float>&, int64_t, int64_t);

#ifdef LOOKUP
static void run_many(const Work<bf16>& work) {
  const int64_t panels = (work.width + many::PANEL - 1) / many::PANEL, bands = (work.count + many::BAND - 1) / many::BAND;
  const int64_t chunk = panels * bands / (4 * omp_get_num_threads()) + 1;
#pragma omp for schedule(dynamic, chunk)
  for (int64_t i = 0; i < panels * bands; i++) {
    const int64_t begin = i % bands * many::BAND, left = work.count - begin;
    many::panel(work, i / bands * many::PANEL, begin, left < many::BAND ? left : many::BAND);
  }
}
#endif

template <typename T>
static void run(const Work<T>& work) {
  team(work.width * work.depth, [&] {
#ifdef LOOKUP
    if constexpr (std::is_same_v<T, bf16>)
      if (is_many(work)) return run_many(work);
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (work.width + PANEL - 1) / PANEL; i++)
      panel(work, i * PANEL, (i + 1) * PANEL < work.width ? (i + 1) * PANEL : work.width);
  });
}

EXPORT void llmd_fp8_linear(void* out, const void* x, const code* w, const float* w_scale, const float* x_scale,
                            const void* bias, int64_t count, int64_t width, int64_t depth, int64_t stride, int64_t height,
                            int64_t block, int64_t dtype, int64_t bias_dtype) {
  const Scales scales{w_scale, x_scale, height, block, (depth + block - 1) / block};
  if (dtype == BF16)
    run(Work<bf16>{(bf16*)out, (const bf16*)x, w, bias, scales, count, width, depth, stride, bias_dtype});
  else
    run(Work<float>{(float*)out, (const float*)x, w, bias, scales, count, width, depth, stride, bias_dtype});
}
REPLAYABLE(llmd_fp8_linear)
