// y = x . (e4m3 W * scale)^T: rows of W stay as the checkpoint has them and become wider in registers, sums are float32.
// A block of W has one scale, so a row's sum over a block is scaled as a whole; so is x where its scales are by block.
// Few rows of x: in registers, at the memory's speed. Many: a panel of W at a time is widened for all of them.
#pragma once
#include "common.h"

#include <vector>
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define LOOKUP 1
#endif

namespace fp8 {

constexpr int64_t PANEL = 64;    // rows of W
constexpr int64_t BAND = 64;     // rows of x that stay in the cache with them
constexpr int64_t SOME = 8;      // rows of W that are widened at once
constexpr int64_t WIDE_FROM = 5;  // rows of x for which that is faster than doing it in registers, again for each four
typedef uint8_t code;           // the bit pattern

struct Scales {  // of W, a row of them each `height` rows of W; of x, a row of them a row, or none
  const float *w, *x;
  int64_t height, block, num_blocks;
  const float* row(int64_t n) const { return w + n / height * num_blocks; }
  float both(float w_scale, int64_t m, int64_t b) const { return x ? w_scale * x[m * num_blocks + b] : w_scale; }
};

// Sixteen e4m3 to float32: the exponent's bias is 7 instead of 127, subnormals included; 0x7f and 0xff are NaN.
typedef uint8_t vub __attribute__((vector_size(16), aligned(1)));
static inline vf widen_fp8(const code* p) {
  vu u = __builtin_convertvector(*(const vub*)p, vu), magnitude = u & 0x7f;
  vf x = (vf)(magnitude << 20) * 1.329227995784916e36f;  // 2^120
  vu nan = (vu)(magnitude == 0x7f) & 0x7fc00000u;
  return (vf)((vu)x | nan | (u & 0x80) << 24);
}
static inline vf widen_fp8(const code* p, int64_t n) {
  code some[L] = {};
  memcpy(some, p, n);
  return widen_fp8(some);
}

template <typename T>
struct Plain {  // float32 arithmetic
  static constexpr int STEP = L;
  typedef vf Wide;
  static Wide weights(const code* p) { return widen_fp8(p); }
  static Wide weights(const code* p, int64_t n) { return widen_fp8(p, n); }
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
  static Wide weights(__m512i w) { return in_halves(_mm512_permutexvar_epi8(_mm512_load_si512(ORDER.at), w)); }
  static Wide in_halves(__m512i w) {  // of each 16 bytes
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(TABLE.low), w, _mm512_load_si512(TABLE.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(TABLE.high), w, _mm512_load_si512(TABLE.high + 64));
    high = _mm512_ternarylogic_epi32(high, w, _mm512_set1_epi8((char)0x80), 0xf8);  // high | (w & sign)
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }
  static Wide weights(const code* p) { return weights(_mm512_loadu_si512(p)); }
  static Wide weights(const code* p, int64_t n) { return weights(_mm512_maskz_loadu_epi8((1ull << n) - 1, p)); }
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
  const code* w;
  const void* bias;
  Scales scales;
  int64_t count, width, depth, stride, bias_dtype;
  float bias_at(int64_t n) const {
    if (!bias) return 0;
    return bias_dtype == BF16 ? widen(((const bf16*)bias)[n]) : ((const float*)bias)[n];
  }
};

// w: the rows of W from n0, as they are stored or wide.
template <int M, int N, typename W, typename T>
static __attribute__((noinline)) void tile(const Work<T>& work, const W* w, int64_t m0, int64_t n0) {
  typedef Way<T> V;
  const T* x = work.x + m0 * work.stride;
  const code* next = work.w + (n0 + (sizeof(W) == 1 ? 2 * N : SOME)) * work.depth;  // rows to come
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
    narrow(work.out + m * work.width + n, sum(total[i]) + work.bias_at(n));
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
static inline void widen_rows(bf16* to, const code* from, int64_t count) {
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

#ifdef LOOKUP
// Many rows of x: sixteen rows of W become bfloat16 once for up to BAND of them, a SEGMENT of the features at a time that
// stays in the first level, four features of a row side by side:
//
//     4 features | rows 0, 1, 4, 5, 8 ... | those 4 features | rows 2, 3, 6, 7, 10 ... | those 4 features
//
// So four of x's values in every lane of eight bytes are the other operand, and two neighbours add up to a row's sum.
namespace many {
constexpr int64_t PANEL = 16, BAND = 256, SEGMENT = 512;
constexpr int ROWS = 8;  // of x, at once

// Row i's j-th word becomes row j's i-th.
static inline void transpose(__m512i (&r)[16]) {
  __m512i a[16], b[16];
  EACH(i, 8)
    a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  END
  EACH(i, 8)
    constexpr int from = i / 2 * 4 + i % 2;
    b[2 * i] = _mm512_unpacklo_epi64(a[from], a[from + 2]);
    b[2 * i + 1] = _mm512_unpackhi_epi64(a[from], a[from + 2]);
  END
  EACH(c, 4)
    const __m512i even = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    r[c] = _mm512_shuffle_i32x4(even, even2, 0x88), r[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    r[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88), r[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  END
}

// A panel's `count` rows, 64 features at a time.
static void widen(bf16* to, const code* w, int64_t depth, int64_t count, int64_t length) {
  for (int64_t k = 0; k < length; k += 64) {
    __m512i some[16];
    for (int64_t n = 0; n < PANEL; n++) some[n] = n < count ? _mm512_loadu_si512(w + n * depth + k) : _mm512_setzero_si512();
    transpose(some);
    for (const __m512i four : some) {
      const Fast::Wide wide = Fast::in_halves(four);
      _mm512_store_si512(to, wide.first);
      _mm512_store_si512(to + 32, wide.second);
      to += 64;
    }
  }
}

struct Fetch {  // the panel's next features, or the next panel's first: asked for while the products are taken
  const code* from;
  int64_t apart;
  void line(int64_t k) const { __builtin_prefetch(from + (k / 4 & 15) * apart + k / 64 * 64, 0, 2); }
};

static inline vf neighbours(vf low, vf high) {
  return __builtin_shufflevector(low, high, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(low, high, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

// total [M] += the products of M rows of x with a wide panel, times its scales and theirs
template <int M>
static __attribute__((noinline)) void tile(vf* total, const bf16* x, int64_t stride, const bf16* w, int64_t length, vf scale,
                                           const float* x_scale, int64_t x_scales, Fetch fetch) {
  constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;  // sums of their own, where there are too few to hide a dot's latency
  vf acc[2 * M * CHAINS];
  EACH(i, 2 * M * CHAINS) acc[i] = vf{}; END
  const int64_t three = 3 * stride;  // few addresses for many rows: base + 0, 1, 2, 3 strides
  const bf16* high = x + 4 * stride;
  for (int64_t k = 0; k < length; k += 4 * CHAINS, w += 64 * CHAINS, x += 4 * CHAINS, high += 4 * CHAINS) {
    EACH(c, CHAINS)
      const __m512bh first = (__m512bh)_mm512_load_si512(w + 64 * c), second = (__m512bh)_mm512_load_si512(w + 64 * c + 32);
      fetch.line(k + 4 * c);
      EACH(m, M)
        int64_t four;
        memcpy(&four, (m < 4 ? x : high) + (m % 4 == 3 ? three : m % 4 * stride) + 4 * c, 8);
        const __m512bh a = (__m512bh)_mm512_set1_epi64(four);
        constexpr int to = 2 * (m * CHAINS + c);
        acc[to] = (vf)_mm512_dpbf16_ps((__m512)acc[to], first, a);
        acc[to + 1] = (vf)_mm512_dpbf16_ps((__m512)acc[to + 1], second, a);
      END
    END
  }
  EACH(m, M)
    EACH(c, CHAINS - 1)
      acc[2 * m * CHAINS] += acc[2 * (m * CHAINS + c + 1)];
      acc[2 * m * CHAINS + 1] += acc[2 * (m * CHAINS + c + 1) + 1];
    END
    const vf sum = neighbours(acc[2 * m * CHAINS], acc[2 * m * CHAINS + 1]);
    total[m] += sum * (x_scale ? scale * x_scale[m * x_scales] : scale);
  END
}

// f(m, M) for pieces of `count` rows of x
template <class F>
static inline void by_rows(int64_t count, F f) {
  int64_t m = 0;
  for (; m + 8 <= count; m += 8) f(m, std::integral_constant<int, 8>{});
  if (m + 4 <= count) f(m, std::integral_constant<int, 4>{}), m += 4;
  if (m + 2 <= count) f(m, std::integral_constant<int, 2>{}), m += 2;
  if (m < count) f(m, std::integral_constant<int, 1>{});
}

// How many features to widen at once: whole blocks, or even parts of one.
static inline int64_t segment_of(int64_t block) {
  if (block <= SEGMENT) return SEGMENT / block * block;
  const int64_t parts = (block + SEGMENT - 1) / SEGMENT;
  return (block + 64 * parts - 1) / (64 * parts) * 64;
}

static inline void panel(const Work<bf16>& work, int64_t n0, int64_t begin, int64_t count) {
  alignas(64) bf16 wide[SEGMENT * PANEL];
  alignas(64) vf total[BAND];
  for (int64_t m = 0; m < count; m++) total[m] = vf{};
  const Scales& scales = work.scales;
  const int64_t rows = work.width - n0 < PANEL ? work.width - n0 : PANEL;
  const int64_t block = scales.block < work.depth ? scales.block : work.depth, segment = segment_of(block);
  const float* scale_of[PANEL];
  for (int64_t n = 0; n < rows; n++) scale_of[n] = scales.row(n0 + n);
  const bool is_one = scale_of[0] == scale_of[rows - 1];
  for (int64_t k = 0; k < work.depth; k += segment) {
    const int64_t length = work.depth - k < segment ? work.depth - k : segment;
    const code* w = work.w + n0 * work.depth + k;
    const code* next = k + length < work.depth ? w + length : w - k + PANEL * work.depth;
    widen(wide, w, work.depth, rows, length);
    for (int64_t at = k, end; at < k + length; at = end) {
      const int64_t b = at / block;
      end = (b + 1) * block < k + length ? (b + 1) * block : k + length;
      vf scale = splat(scale_of[0][b]);
      for (int64_t n = 1; n < rows && !is_one; n++) scale[n] = scale_of[n][b];
      by_rows(count, [&](int64_t m, auto M) {
        tile<M>(total + m, work.x + (begin + m) * work.stride + at, work.stride, wide + (at - k) * PANEL, end - at, scale,
                scales.x ? scales.x + (begin + m) * scales.num_blocks + b : nullptr, scales.num_blocks,
                m ? Fetch{w, 0} : Fetch{next + (at - k), work.depth});
      });
    }
  }
  vf bias = vf{};
  for (int64_t n = 0; n < rows; n++) bias[n] = work.bias_at(n0 + n);
  for (int64_t m = 0; m < count; m++) {
    bf16* out = work.out + (begin + m) * work.width + n0;
    const vf y = total[m] + bias;
    if (rows == PANEL)
      store(out, y);
    else
      for (int64_t n = 0; n < rows; n++) narrow(out + n, y[n]);
  }
}

}  // namespace many
#endif

#ifdef LOOKUP
static inline bool is_many(const Work<bf16>& work) {
  return work.count >= WIDE_FROM && work.depth % 64 == 0 && (work.scales.block % 64 == 0 || work.scales.num_blocks == 1);
}
#endif

// All rows of x by rows of W from `begin`, a multiple of 16, to `end`, PANEL further at most.
template <typename T>
void panel(const Work<T>& work, int64_t begin, int64_t end) {
#ifdef LOOKUP
  if constexpr (std::is_same_v<T, bf16>)
    if (is_many(work)) {
      for (int64_t m = 0; m < work.count; m += many::BAND)
        for (int64_t n = begin; n < end; n += many::PANEL)
          many::panel(work, n, m, work.count - m < many::BAND ? work.count - m : many::BAND);
      return;
    }
#endif
  static thread_local std::vector<bf16> wide;
  if (work.count < WIDE_FROM) return columns(work, work.w + begin * work.depth, 0, work.count, begin, end);
  wide.resize(SOME * work.depth);
  for (int64_t m = 0; m < work.count; m += BAND)
    for (int64_t n = begin; n < end; n += SOME) {
      const int64_t last = n + SOME < end ? n + SOME : end;
      widen_rows(wide.data(), work.w + n * work.depth, (last - n) * work.depth);
      columns(work, wide.data(), m, m + BAND < work.count ? m + BAND : work.count, n, last);
    }
}

// Made in fp8_linear/cpu.cpp.
extern template void panel(const Work<bf16>&, int64_t, int64_t);
extern template void panel(const Work<float>&, int64_t, int64_t);

}  // namespace fp8
