// y = (x_q - zero) . W_q * s_x * s_w + b with x_q unsigned and W_q signed 8-bit: the operands of VNNI's dot product, whose
// integers add up exactly. W stays row by row; the zero point is taken out by the sums of its rows. Loops as in linear.
#include "common.h"
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

constexpr int64_t PANEL = 64;  // rows of W
constexpr int64_t BAND = 64;   // rows of x that stay in the cache with them
constexpr int MIDDLE = 128;    // of unsigned 8 bits

struct Scales {  // by row of W
  const float* scale;
  const int32_t* sum;
  const float* bias;
  int32_t zero;  // the x_q that stands for 0
};

#ifdef __AVX512VNNI__
constexpr int STEP = 64;
typedef __m512i Some;
static inline Some take(const void* p) { return _mm512_loadu_si512(p); }
static inline Some take(const void* p, int64_t n) { return _mm512_maskz_loadu_epi8((1ull << n) - 1, p); }
static inline vi dot(vi acc, Some a, Some b) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, a, b); }
#else
constexpr int STEP = L;
typedef int8_t vb __attribute__((vector_size(16), aligned(1)));
typedef uint8_t vub __attribute__((vector_size(16), aligned(1)));
typedef vi Some;
static inline Some take(const uint8_t* p) { return __builtin_convertvector(*(const vub*)p, vi); }
static inline Some take(const int8_t* p) { return __builtin_convertvector(*(const vb*)p, vi); }
template <typename T>
static inline Some take(const T* p, int64_t n) {
  T x[L] = {};
  memcpy(x, p, n);
  return take((const T*)x);
}
static inline vi dot(vi acc, Some a, Some b) { return acc + a * b; }
#endif

// Lane i of the result is the sum of a[i]'s lanes: half as many vectors at every step, instead of a reduction each.
static inline vi totals(const vi (&a)[16]) {
  vi b[8], c[4], d[2];
  EACH(i, 8)
    b[i] = __builtin_shufflevector(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  END
  EACH(i, 4)
    c[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  END
  EACH(i, 2)
    d[i] = __builtin_shufflevector(c[i], c[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(c[i], c[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  END
  return __builtin_shufflevector(d[0], d[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(d[0], d[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// The values of N columns, of four, in each row of a 4 x 4 tile.
template <int N, typename T>
static inline auto columns(const T* p) {
  typedef T four __attribute__((vector_size(16)));
  four x = {};
  memcpy(&x, p, N * sizeof(T));
  return __builtin_shufflevector(x, x, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
}

// The values of M rows, of four, in each column of a 4 x 4 tile.
template <int M>
static inline vf each_row(const float* p) {
  vf4 x = {};
  memcpy(&x, p, M * sizeof(float));
  return __builtin_shufflevector(x, x, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
}

template <int M, int N, typename T>
static inline void save(T* out, int64_t width, vf y) {
  T all[16];
  store(all, y);
  EACH(m, M) memcpy(out + m * width, all + 4 * m, N * sizeof(T)); END
}

template <int M, int N, typename T>
static void tile(T* out, int64_t width, const uint8_t* x, const float* x_scale, const int8_t* w, Scales to, int64_t depth) {
  vi acc[M * N];
  EACH(i, M * N) acc[i] = vi{}; END
  int64_t k = 0;
  for (; k + STEP <= depth; k += STEP) {
    Some b[N];
    EACH(n, N)
      b[n] = take(w + n * depth + k);
      __builtin_prefetch(w + (n + 2 * N) * depth + k, 0, 1);
    END
    EACH(m, M)
      Some a = take(x + m * depth + k);
      EACH(n, N) acc[m * N + n] = dot(acc[m * N + n], a, b[n]); END
    END
  }
  if (k < depth) {
    Some b[N];
    EACH(n, N) b[n] = take(w + n * depth + k, depth - k); END
    EACH(m, M)
      Some a = take(x + m * depth + k, depth - k);
      EACH(n, N) acc[m * N + n] = dot(acc[m * N + n], a, b[n]); END
    END
  }
  vi all[16];  // N = 4 of them a row, absent ones zero
  EACH(i, 16)
    if constexpr (i / 4 < M && i % 4 < N)
      all[i] = acc[i / 4 * N + i % 4];
    else
      all[i] = vi{};
  END
  const vi sums = totals(all) - to.zero * columns<N>(to.sum);
  const vf y = __builtin_convertvector(sums, vf) * (each_row<M>(x_scale) * columns<N>(to.scale));
  save<M, N>(out, width, to.bias ? y + columns<N>(to.bias) : y);
}

template <int N, typename T>
static void rows(T* out, int64_t width, const uint8_t* x, const float* x_scale, const int8_t* w, Scales to, int64_t count,
                 int64_t depth) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) tile<4, N>(out + m * width, width, x + m * depth, x_scale + m, w, to, depth);
  out += m * width, x += m * depth, x_scale += m;
  switch (count - m) {
    case 3: tile<3, N>(out, width, x, x_scale, w, to, depth); break;
    case 2: tile<2, N>(out, width, x, x_scale, w, to, depth); break;
    case 1: tile<1, N>(out, width, x, x_scale, w, to, depth); break;
  }
}

template <typename T>
static void run(T* out, const uint8_t* x, const float* x_scale, const int8_t* w, Scales to, int64_t count, int64_t width,
                int64_t depth) {
#pragma omp parallel for num_threads(threads()) schedule(dynamic, 1)
  for (int64_t panel = 0; panel < (width + PANEL - 1) / PANEL; panel++) {
    const int64_t begin = panel * PANEL, end = begin + PANEL < width ? begin + PANEL : width;
    for (int64_t m = 0; m < count; m += BAND) {
      const int64_t some = count - m < BAND ? count - m : BAND;
      for (int64_t n = begin; n < end;) {
        Scales here{to.scale + n, to.sum + n, to.bias ? to.bias + n : to.bias, to.zero};
        if (n + 4 <= end)
          rows<4>(out + m * width + n, width, x + m * depth, x_scale + m, w + n * depth, here, some, depth), n += 4;
        else
          rows<1>(out + m * width + n, width, x + m * depth, x_scale + m, w + n * depth, here, some, depth), n += 1;
      }
    }
  }
}

EXPORT void llmd_int8_linear(void* out, const uint8_t* x, const float* x_scale, const int8_t* w, const float* w_scale,
                             const int32_t* w_sum, const float* bias, int64_t count, int64_t width, int64_t depth,
                             int64_t zero, int64_t dtype) {
  Scales to{w_scale, w_sum, bias, MIDDLE + (int32_t)zero};
  if (dtype == BF16)
    run((bf16*)out, x, x_scale, w, to, count, width, depth);
  else
    run((float*)out, x, x_scale, w, to, count, width, depth);
}

static inline int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}

static inline vf between(vf x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

// Each row of x to unsigned 8 bits: x_q = round(x / s) + 128 + zero, with s = max|x| / 127 of the row, or the one `given`.
template <typename T>
static void quantize(uint8_t* out, float* scale, const T* x, const float* given, int64_t count, int64_t depth, int64_t stride,
                     int32_t zero) {
  const float low = -128.0f - zero, high = 127.0f - zero;
#pragma omp parallel for num_threads(threads()) if (count * depth * (int64_t)sizeof(T) > PARALLEL_BYTES)
  for (int64_t t = 0; t < count; t++) {
    const T* row = x + t * stride;
    vi top = vi{};  // the bits of |x| are ordered as |x| is, and a NaN is above all
    int32_t highest = 0;
    int64_t k = 0;
    for (; k + L <= depth; k += L) {
      vi bits = (vi)load(row + k) & 0x7fffffff, more = bits > top;
      top = (bits & more) | (top & ~more);
    }
    for (; k < depth; k++) highest = bits_of(widen(row[k])) > highest ? bits_of(widen(row[k])) : highest;
    for (int i = 0; i < L; i++) highest = top[i] > highest ? top[i] : highest;
    if (highest >= 0x7f800000) {  // not finite: neither is any output of this row
      scale[t] = __builtin_nanf("");
      memset(out + t * depth, MIDDLE, depth);
      continue;
    }
    float most;
    memcpy(&most, &highest, 4);
    float s = given ? *given : most / 127.0f;
    if (s < 1.17549435e-38f) s = 1.17549435e-38f;
    scale[t] = s;
    float inverse = 1.0f / s;
    const vf magic = splat(12582912.0f);  // adding it rounds to the nearest integer, halves to even
    for (k = 0; k < depth; k += L) {
      const int64_t some = depth - k < L ? depth - k : L;
      T rest[L] = {};
      if (some < L) memcpy(rest, row + k, some * sizeof(T));
      const vf wide = load(some < L ? rest : row + k) * inverse;
      vi q = (vi)(between(wide, low, high) + magic) - (vi)magic + (MIDDLE + zero);
      typedef uint8_t vub __attribute__((vector_size(16)));
      const vub narrowed = __builtin_convertvector(q, vub);
      memcpy(out + t * depth + k, &narrowed, some);
    }
  }
}

EXPORT void llmd_quantize_rows(uint8_t* out, float* scale, const void* x, const float* given, int64_t count, int64_t depth,
                               int64_t stride, int64_t zero, int64_t dtype) {
  if (dtype == BF16)
    quantize(out, scale, (const bf16*)x, given, count, depth, stride, (int32_t)zero);
  else
    quantize(out, scale, (const float*)x, given, count, depth, stride, (int32_t)zero);
}
