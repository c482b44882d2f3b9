// y = x . W^T with W as codes of 4 bits into a table of 16 floats: the table lies in a register, a look-up is one
// instruction. A byte holds an even column's code and, above it, that of the odd one behind: x is taken apart as well.
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

// Thirty-two of x: the even columns and the odd ones.
static inline void pairs(vf& even, vf& odd, const bf16* x) {
  vu both;
  memcpy(&both, x, sizeof(both));
  even = (vf)(both << 16), odd = (vf)(both & 0xffff0000u);
}
static inline void pairs(vf& even, vf& odd, const float* x) {
  const vf a = load(x), b = load(x + L);
  even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

constexpr int64_t F16 = 2;  // beside DType's first two, of scales
static inline float number(const void* from, int64_t i, int64_t dtype) {
  if (dtype == F32) return ((const float*)from)[i];
  const uint16_t bits = ((const uint16_t*)from)[i];
  if (dtype == BF16) return widen((bf16)bits);
  const uint32_t wide = (uint32_t)(bits & 0x7fff) << 13;
  float size;
  memcpy(&size, &wide, 4);
  return (bits & 0x8000 ? -0x1p112f : 0x1p112f) * size;  // the exponents' biases apart; scales are finite
}

struct Codes {
  const uint8_t* packed;  // [N, half]
  const void* scale;      // [N, num_groups]
  vf table;
  int64_t half, group, scale_dtype;  // bytes of a row, of a group
};

// Sums of M rows of x with row n of W.
template <int M, typename T>
static void dot(const Codes& w, const T* x, int64_t stride, int64_t n, float* sums) {
  vf total[M] = {};
  const uint8_t* row = w.packed + n * w.half;
  int64_t scale = n * (w.half / w.group);
  for (int64_t start = 0; start < w.half; start += w.group, scale++) {
    vf acc[M] = {};
    for (int64_t k = start; k < start + w.group; k += L) {
      vi both = words((const int8_t*)row + k);  // the sign's copies are masked away
      vf even = look_up(w.table, both & 15), odd = look_up(w.table, (both >> 4) & 15);
      EACH(m, M)
        vf x_even, x_odd;
        pairs(x_even, x_odd, x + m * stride + 2 * k);
        acc[m] += even * x_even + odd * x_odd;
      END
    }
    const vf of_group = splat(number(w.scale, scale, w.scale_dtype));
    EACH(m, M) total[m] += acc[m] * of_group; END
  }
  EACH(m, M) sums[m] = sum(total[m]); END
}

template <typename T>
static void run(T* out, const T* x, int64_t stride, const Codes& w, const void* bias, int64_t bias_dtype, int64_t count,
                int64_t width) {
  team(width * w.half, [&] {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < width; first += PANEL)
      for (int64_t m = 0; m < count; m += ROWS)
        for (int64_t n = first; n < width && n < first + PANEL; n++) {
          float sums[ROWS];
          const T* some = x + m * stride;
          int64_t left = count - m < ROWS ? count - m : ROWS;
          if (left == 4) dot<4>(w, some, stride, n, sums);
          else if (left == 3) dot<3>(w, some, stride, n, sums);
          else if (left == 2) dot<2>(w, some, stride, n, sums);
          else dot<1>(w, some, stride, n, sums);
          for (int64_t i = 0; i < left; i++)
            narrow(out + (m + i) * width + n, sums[i] + (bias ? number(bias, n, bias_dtype) : 0.0f));
        }
  });
}

EXPORT void llmd_codebook_linear(void* out, const void* x, const uint8_t* packed, const void* scale, const float* codebook,
                                 const void* bias, int64_t count, int64_t width, int64_t half, int64_t group, int64_t stride,
                                 int64_t dtype, int64_t scale_dtype, int64_t bias_dtype) {
  Codes w{packed, scale, load(codebook), half, group, scale_dtype};
  if (dtype == F32) run((float*)out, (const float*)x, stride, w, bias, bias_dtype, count, width);
  else run((bf16*)out, (const bf16*)x, stride, w, bias, bias_dtype, count, width);
}
REPLAYABLE(llmd_codebook_linear)
