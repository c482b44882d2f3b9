#include "gates.h"

template <int KIND, typename T>
static void run(T* out, const T* x, int64_t rows, int64_t dim) {
  team(rows * dim * (int64_t)sizeof(T), [=] {
    const int64_t threads = omp_get_num_threads(), pieces = rows < 4 * threads ? threads : 1;  // of a row
    const int64_t piece = ((dim + pieces - 1) / pieces + 2 * L - 1) / (2 * L) * (2 * L);
#pragma omp for
    for (int64_t i = 0; i < rows * pieces; i++) {
      const int64_t begin = i % pieces * piece, end = begin + piece < dim ? begin + piece : dim;
      gate<KIND>(out + i / pieces * dim, x + i / pieces * 2 * dim, dim, begin, end);
    }
  });
}

template <typename T>
static void choose(T* out, const T* x, int64_t rows, int64_t dim, int64_t kind) {
  switch (kind) {
    case SILU: return run<SILU>(out, x, rows, dim);
    case GELU: return run<GELU>(out, x, rows, dim);
    case GELU_TANH: return run<GELU_TANH>(out, x, rows, dim);
  }
}

EXPORT void llmd_silu_mul(void* out, const void* x, int64_t rows, int64_t dim, int64_t kind, int64_t dtype) {
  dtype == BF16 ? choose((bf16*)out, (const bf16*)x, rows, dim, kind) : choose((float*)out, (const float*)x, rows, dim, kind);
}
REPLAYABLE(llmd_silu_mul)
