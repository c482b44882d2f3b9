// Rows of W stay as the checkpoint has them: the products of dense.h, shared out among the threads.
#include "dense.h"

using namespace dense;

template void dense::few(bf16*, const Product<bf16>&, int64_t, int64_t, const bf16*);
template void dense::strip(bf16*, const Product<bf16>&, int64_t, int64_t, int64_t, const bf16*, int64_t);

template <typename T>
static void few(T* out, const Product<bf16>& p) {
  const int64_t piece = piece_of(p);
#pragma omp for schedule(dynamic, 1)
  for (int64_t begin = 0; begin < p.width; begin += piece) {
    const int64_t after = begin + piece * omp_get_num_threads();  // at a guess
    few(out, p, begin, least(begin + piece, p.width), p.w + after * p.w_stride);
  }
}

template <typename T>
static void many(T* out, const Product<bf16>& p) {
  const int64_t panels = (p.width + COLUMNS - 1) / COLUMNS, tiles = (p.count + ROWS - 1) / ROWS;
  const int64_t num_threads = omp_get_num_threads(), enough = (6 * num_threads + panels - 1) / panels;
  // As few bands as do, because each packs W anew; enough of them that no thread waits long for the last.
  const int64_t bands = most((tiles + MAX_ROWS / ROWS - 1) / (MAX_ROWS / ROWS), least(enough, tiles / 16));
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < panels * bands; i++) {
    const int64_t band = i % bands, begin = tiles * band / bands * ROWS, end = tiles * (band + 1) / bands * ROWS;
    const int64_t n = i / bands * COLUMNS, after = (i + num_threads) / bands * COLUMNS;
    strip(out, p, begin, least(end, p.count), n, p.w + after * p.w_stride, most(0, least(COLUMNS, p.width - after)));
  }
}

template <typename T>
static void run(T* out, const Product<bf16>& p) {
  team(p.width * p.depth * (int64_t)sizeof(bf16), [=] {
    if (p.count <= MANY)
      few(out, p);
    else
      many(out, p);
  });
}

EXPORT void llmd_linear(void* out, const bf16* x, const bf16* w, const bf16* bias, int64_t count, int64_t width,
                        int64_t depth, int64_t x_stride, int64_t w_stride, int64_t out_dtype) {
  const Product<bf16> product{x, w, bias, count, width, depth, x_stride, w_stride};
  if (out_dtype == BF16)
    run((bf16*)out, product);
  else
    run((float*)out, product);
}
REPLAYABLE(llmd_linear)
