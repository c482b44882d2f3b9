// y = x . W^T with W as codes of 4 bits into a table of 16 floats: the table lies in a register, a look-up is one
// instruction. A byte holds an even column's code and, above it, the odd one's behind, so x comes with both apart.
#include "common.h"

constexpr int64_t PANEL = 16;  // rows of W of one thread at a time
constexpr int ROWS = 4;        // rows of x that share a look-up

static inline vf look_up(vf table, vi index) {
#ifdef __AVX512F__
  return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
  vf found;
  for (int i = 0; i < L; i++) found[i] = table[index[i]];
  return found;
#endif
}

struct Codes {
  const uint8_t* packed;  // [N, half]
  const float* scale;     // [N, num_groups]
  vf table;
  int64_t half, group;  // bytes of a row, of a group
};

// Sums of `count` rows of x, each [2, half] even columns and odd, with row n of W.
template <int M>
static void dot(const Codes& w, const float* x, int64_t n, float* sums) {
  vf total[M] = {};
  const uint8_t* row = w.packed + n * w.half;
  const float* scale = w.scale + n * (w.half / w.group);
  for (int64_t start = 0; start < w.half; start += w.group, scale++) {
    vf acc[M] = {};
    for (int64_t k = start; k < start + w.group; k += L) {
      vi both = words((const int8_t*)row + k);  // the sign's copies are masked away
      vf even = look_up(w.table, both & 15), odd = look_up(w.table, (both >> 4) & 15);
      EACH(m, M) acc[m] += even * load(x + m * 2 * w.half + k) + odd * load(x + (m * 2 + 1) * w.half + k); END
    }
    EACH(m, M) total[m] += acc[m] * splat(*scale); END
  }
  EACH(m, M) sums[m] = sum(total[m]); END
}

template <typename T>
static void run(T* out, const float* x, const Codes& w, const float* bias, int64_t count, int64_t width) {
  team(width * w.half, [&] {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < width; first += PANEL)
      for (int64_t m = 0; m < count; m += ROWS)
        for (int64_t n = first; n < width && n < first + PANEL; n++) {
          float sums[ROWS];
          const float* some = x + m * 2 * w.half;
          int64_t left = count - m < ROWS ? count - m : ROWS;
          if (left == 4) dot<4>(w, some, n, sums);
          else if (left == 3) dot<3>(w, some, n, sums);
          else if (left == 2) dot<2>(w, some, n, sums);
          else dot<1>(w, some, n, sums);
          for (int64_t i = 0; i < left; i++) narrow(out + (m + i) * width + n, sums[i] + (bias ? bias[n] : 0.0f));
        }
  });
}

EXPORT void llmd_codebook_linear(void* out, const float* x, const uint8_t* packed, const float* scale,
                                 const float* codebook, const float* bias, int64_t count, int64_t width, int64_t half,
                                 int64_t group, int64_t dtype) {
  Codes w{packed, scale, load(codebook), half, group};
  if (dtype == F32) run((float*)out, x, w, bias, count, width);
  else run((bf16*)out, x, w, bias, count, width);
}
REPLAYABLE(llmd_codebook_linear)
