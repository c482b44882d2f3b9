// y = x . (e4m3 W * scale)^T: rows of W stay as the checkpoint has them and become wider in registers, sums are float32.
// A block of W has one scale, so a row's sum over a block is scaled as a whole; so is x where its scales are by block.
#include "common.h"
#include <vector>
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#define LOOKUP 1
#endif

constexpr int64_t PANEL = 64;    // rows of W
constexpr int64_t BAND = 64;     // rows of x that stay in the cache with them
constexpr int64_t SOME = 8;      // rows of W that are widened at once
constexpr int64_t WIDE_FROM = 5;  // rows of x for which that is faster than doing it in registers, again for each four
typedef uint8_t fp8;           // the bit pattern

struct Scales {  // of W, a row of them each `height` rows of W; of x, a row of them a row, or none
  const float *w, *x;
  int64_t height, block, num_blocks;
  const float* row(int64_t n) const { return w + n / height * num_blocks; }
  float both(float w_scale, int64_t m, int64_t b) const { return x ? w_scale * x[m * num_blocks + b] : w_scale; }
};

// Sixteen e4m3 to float32: the exponent's bias is 7 instead of 127, subnormals included; 0x7f and 0xff are NaN.
typedef uint8_t vub __attribute__((vector_size(16), aligned(1)));
static inline vf widen_fp8(const fp8* p) {
  vu u = __builtin_convertvector(*(const vub*)p, vu), magnitude = u & 0x7f;
  vf x = (vf)(magnitude << 20) * 1.329227995784916e36f;  // 2^120
  vu nan = (vu)(magnitude == 0x7f) & 0x7fc00000u;
  return (vf)((vu)x | nan | (u & 0x80) << 24);
}
static inline vf widen_fp8(const fp8* p, int64_t n) {
  fp8 some[L] = {};
  memcpy(some, p, n);
  return widen_fp8(some);
}

template <typename T>
struct Plain {  // float32 arithmetic
  static constexpr int STEP = L;
  typedef vf Wide;
  static Wide weights(const fp8* p) { return widen_fp8(p); }
  static Wide weights(const fp8* p, int64_t n) { return widen_fp8(p, n); }
  static Wide weights(const bf16* p) { return load(p); }
  static Wide weights(const bf16* p, int64_t n) { return Plain<bf16>::inputs(p, n); }
  static Wide inputs(const T* p) { return load(p); }
  static Wide inputs(const T* p, int64_t n) {
    float x[L] = {};
    for (int64_t i = 0; i < n; i++) x[i] = widen(p[i]);
    return load(x);
  }
  static vf dot(vf acc, Wide a, Wide b) { return acc + a * b; }
};

#ifdef LOOKUP
struct Table {  // the two bytes of each positive e4m3 as bfloat16
  alignas(64) uint8_t low[128], high[128];
  constexpr Table() : low(), high() {
    for (int b = 0; b < 128; b++) {
      int exponent = b >> 3, mantissa = b & 7;
      if (!exponent && mantissa)  // a subnormal of e4m3 is a normal of bfloat16
        for (exponent = 1; mantissa < 8; exponent--) mantissa *= 2;
      int bits = b == 127 ? 0x7fc0 : b ? (exponent + 120) << 7 | (mantissa & 7) << 4 : 0;
      low[b] = bits & 255, high[b] = bits >> 8;
    }
  }
};
constexpr Table TABLE;

struct Order {  // where unpacking by 16 bytes finds what makes 64 values come out in order
  alignas(64) uint8_t at[64];
  constexpr Order() : at() {
    for (int i = 0; i < 64; i++) at[i] = i % 16 / 8 * 32 + i / 16 * 8 + i % 8;
  }
};
constexpr Order ORDER;

struct Fast {  // pairs of bfloat16, 64 at a time
  static constexpr int STEP = 64;
  struct Wide {
    __m512i first, second;
  };
  static Wide weights(__m512i w) {
    w = _mm512_permutexvar_epi8(_mm512_load_si512(ORDER.at), w);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(TABLE.low), w, _mm512_load_si512(TABLE.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(TABLE.high), w, _mm512_load_si512(TABLE.high + 64));
    high = _mm512_ternarylogic_epi32(high, w, _mm512_set1_epi8((char)0x80), 0xf8);  // high | (w & sign)
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }
  static Wide weights(const fp8* p) { return weights(_mm512_loadu_si512(p)); }
  static Wide weights(const fp8* p, int64_t n) { return weights(_mm512_maskz_loadu_epi8((1ull << n) - 1, p)); }
  static Wide weights(const bf16* p) { return inputs(p); }
  static Wide weights(const bf16* p, int64_t n) { return inputs(p, n); }
  static Wide inputs(const bf16* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 32)}; }
  static Wide inputs(const bf16* p, int64_t n) {
    const uint64_t mask = (1ull << n) - 1;
    return {_mm512_maskz_loadu_epi16((uint32_t)mask, p), _mm512_maskz_loadu_epi16(mask >> 32, p + 32)};
  }
  static vf dot(vf acc, Wide a, Wide b) {
    acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a.first, (__m512bh)b.first);
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a.second, (__m512bh)b.second);
  }
};
template <typename T>
using Way = std::conditional_t<std::is_same_v<T, bf16>, Fast, Plain<T>>;
#else
template <typename T>
using Way = Plain<T>;
#endif

template <typename T>
struct Work {
  T* out;
  const T* x;
  const fp8* w;
  const float* bias;
  Scales scales;
  int64_t count, width, depth, stride;
};

// w: the rows of W from n0, as they are stored or wide.
template <int M, int N, typename W, typename T>
static __attribute__((noinline)) void tile(const Work<T>& work, const W* w, int64_t m0, int64_t n0) {
  typedef Way<T> V;
  const T* x = work.x + m0 * work.stride;
  const fp8* next = work.w + (n0 + (sizeof(W) == 1 ? 2 * N : SOME)) * work.depth;  // rows to come
  const float* scale[N];
  EACH(n, N) scale[n] = work.scales.row(n0 + n); END
  vf acc[M * N], total[M * N];
  EACH(i, M * N) total[i] = vf{}; END
  for (int64_t b = 0; b < work.scales.num_blocks; b++) {
    int64_t k = b * work.scales.block;
    const int64_t end = k + work.scales.block < work.depth ? k + work.scales.block : work.depth;
    EACH(i, M * N) acc[i] = vf{}; END
    for (; k + V::STEP <= end; k += V::STEP) {
      typename V::Wide some[N];
      EACH(n, N)
        some[n] = V::weights(w + n * work.depth + k);
        __builtin_prefetch(next + n * work.depth + k, 0, 2);
      END
      EACH(m, M)
        const auto a = V::inputs(x + m * work.stride + k);
        EACH(n, N) acc[m * N + n] = V::dot(acc[m * N + n], a, some[n]); END
      END
    }
    if (k < end) {
      typename V::Wide some[N];
      EACH(n, N) some[n] = V::weights(w + n * work.depth + k, end - k); END
      EACH(m, M)
        const auto a = V::inputs(x + m * work.stride + k, end - k);
        EACH(n, N) acc[m * N + n] = V::dot(acc[m * N + n], a, some[n]); END
      END
    }
    EACH(i, M * N) total[i] += acc[i] * work.scales.both(scale[i % N][b], m0 + i / N, b); END
  }
  EACH(i, M * N)
    const int64_t m = m0 + i / N, n = n0 + i % N;
    const float y = sum(total[i]);
    narrow(work.out + m * work.width + n, work.bias ? y + work.bias[n] : y);
  END
}

template <typename W, typename T>
static void columns(const Work<T>& work, const W* w, int64_t begin, int64_t last, int64_t n, int64_t end) {
  for (; n + 4 <= end; n += 4, w += 4 * work.depth) {
    int64_t m = begin;
    for (; m + 4 <= last; m += 4) tile<4, 4>(work, w, m, n);
    if (sizeof(W) == 1 && m + 2 <= last) tile<2, 4>(work, w, m, n), m += 2;
    for (; m < last; m++) tile<1, 4>(work, w, m, n);
  }
  for (; n < end; n++, w += work.depth)
    for (int64_t m = begin; m < last; m++) tile<1, 1>(work, w, m, n);
}

// e4m3 to bfloat16, which holds it exactly.
static void widen_rows(bf16* to, const fp8* from, int64_t count) {
  int64_t i = 0;
#ifdef LOOKUP
  for (; i + 64 <= count; i += 64) {
    const Fast::Wide some = Fast::weights(from + i);
    _mm512_storeu_si512(to + i, some.first);
    _mm512_storeu_si512(to + i + 32, some.second);
  }
#endif
  for (; i + L <= count; i += L) store(to + i, widen_fp8(from + i));
  for (const vf rest = widen_fp8(from + i, count - i); i < count; i++) narrow(to + i, rest[i % L]);
}

template <typename T>
static void run(const Work<T>& work) {
  team(work.width * work.depth, [&] {
    static thread_local std::vector<bf16> wide;
#pragma omp for schedule(dynamic, 1)
    for (int64_t panel = 0; panel < (work.width + PANEL - 1) / PANEL; panel++) {
      const int64_t begin = panel * PANEL, end = begin + PANEL < work.width ? begin + PANEL : work.width;
      if (work.count < WIDE_FROM) {
        columns(work, work.w + begin * work.depth, 0, work.count, begin, end);
        continue;
      }
      wide.resize(SOME * work.depth);
      for (int64_t m = 0; m < work.count; m += BAND)
        for (int64_t n = begin; n < end; n += SOME) {
          const int64_t last = n + SOME < end ? n + SOME : end;
          widen_rows(wide.data(), work.w + n * work.depth, (last - n) * work.depth);
          columns(work, wide.data(), m, m + BAND < work.count ? m + BAND : work.count, n, last);
        }
    }
  });
}

EXPORT void llmd_fp8_linear(void* out, const void* x, const fp8* w, const float* w_scale, const float* x_scale,
                            const float* bias, int64_t count, int64_t width, int64_t depth, int64_t stride, int64_t height,
                            int64_t block, int64_t dtype) {
  const Scales scales{w_scale, x_scale, height, block, (depth + block - 1) / block};
  if (dtype == BF16)
    run(Work<bf16>{(bf16*)out, (const bf16*)x, w, bias, scales, count, width, depth, stride});
  else
    run(Work<float>{(float*)out, (const float*)x, w, bias, scales, count, width, depth, stride});
}
REPLAYABLE(llmd_fp8_linear)
