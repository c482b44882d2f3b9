// What products of 8-bit integers share: the layout of W, the dot product, and where the results go.
//
// Sixteen rows of W lie side by side in a panel, four features of each in a lane, so that sums need no crossing of lanes:
//
//     panel of 16 rows | 4 features | 16 rows | those 4 features, a byte each
//
// W is unsigned, x signed: four of x's values in every lane are VNNI's other operand. Panels far apart are read at once,
// each a stream of its own: of one stream alone a core gets four fifths of what memory gives.
#pragma once
#include "common.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

constexpr int64_t PANEL = 16;      // rows of W
constexpr int64_t AHEAD = 2048;    // bytes that a stream is asked for before they are needed
constexpr int ROWS = 8;            // of x, most at once
constexpr int COLUMNS = 3;         // panels, most at once: 24 sums, and registers left for the operands
constexpr int64_t OWN = 12 << 10;  // bytes of quantized x that each thread rather makes for itself than waits for

// dot: acc[n] += the four features of row n in w . four of x
#if defined(__AVX512VNNI__)
typedef vi Four;
static inline Four four(const int8_t* x) {
  int32_t bits;
  memcpy(&bits, x, 4);
  return (vi)_mm512_set1_epi32(bits);
}
static inline vi dot(vi acc, vi w, Four x) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x); }
#elif defined(__AVX2__)
struct Four {
  __m256i even, odd;  // 16 bits each
};
static inline Four four(const int8_t* x) {
  return {_mm256_set1_epi32((uint16_t)x[0] | (uint32_t)x[2] << 16),
          _mm256_set1_epi32((uint16_t)x[1] | (uint32_t)x[3] << 16)};
}
static inline vi dot(vi acc, vi w, Four x) {
  const __m256i low = _mm256_set1_epi32(0x00ff00ff);
  __m256i half[2];
  memcpy(half, &w, 64);
  for (__m256i& some : half)
    some = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(some, low), x.even),
                            _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(some, 8), low), x.odd));
  vi sums;
  memcpy(&sums, half, 64);
  return acc + sums;
}
#else
struct Four {
  int32_t x[4];
};
static inline Four four(const int8_t* x) { return {{x[0], x[1], x[2], x[3]}}; }
static inline vi dot(vi acc, vi w, Four f) {
  const vu u = (vu)w;
  return acc + (vi)(u & 255) * f.x[0] + (vi)(u >> 8 & 255) * f.x[1] + (vi)(u >> 16 & 255) * f.x[2] + (vi)(u >> 24) * f.x[3];
}
#endif

// How a product is shared out: the same place of up to COLUMNS panels, `each` apart, with a band of x's rows. A thread
// takes several neighbours at once, so that what is fetched ahead is its own.
struct Share {
  int64_t num_panels, columns, each, band, bands, chunk;
  Share(int64_t width, int64_t count, int64_t band)
      : num_panels((width + PANEL - 1) / PANEL), band(band), bands((count + band - 1) / band) {
    const int64_t threads = omp_get_num_threads(), most = num_panels / (2 * threads);
    columns = most < COLUMNS ? 1 : COLUMNS;
    each = (num_panels + columns - 1) / columns;
    chunk = each * bands / (4 * threads) + 1;
  }
  int64_t rows_at(int64_t begin, int64_t count) const { return count - begin < band ? count - begin : band; }

  // f(p, N) for the panels p, p + each ... of a place: all at once, or where some lack one by one
  template <class F>
  void at(int64_t place, F f) const {
    if (columns == COLUMNS && place + (COLUMNS - 1) * each < num_panels)
      f(place, std::integral_constant<int, COLUMNS>{});
    else
      for (int64_t p = place; p < num_panels; p += each) f(p, std::integral_constant<int, 1>{});
  }
};

// f(m, M) for pieces of `count` rows of x; the last may reach over the end, into rows whose results nobody wants.
template <class F>
static inline void by_rows(int64_t count, F f) {
  int64_t m = 0;
  for (; m + 4 < count; m += 8) f(m, std::integral_constant<int, 8>{});
  if (m + 1 < count)
    f(m, std::integral_constant<int, 4>{});
  else if (m < count)
    f(m, std::integral_constant<int, 1>{});
}

struct Fetch {  // what each stream is asked for next, and how far that goes with every 64 bytes that are read
  const uint8_t* from;
  int64_t apart;
  // Of a tile that is the `pass`th of several over the same `bytes`: its share of those that follow them.
  static Fetch of(const uint8_t* at, int64_t bytes, int64_t pass, int64_t passes) {
    if (passes == 1) return {at + AHEAD, 64};
    return {at + bytes + pass * bytes / passes, 64 / passes};
  }
};

// |x| as the bits of a float: they are ordered as it is, and a NaN is above all.
static inline vi size_of(vf x) { return (vi)x & 0x7fffffff; }
static inline float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline vi larger(vi a, vi b) { return a > b ? a : b; }

typedef int32_t vi8 __attribute__((vector_size(32)));
typedef int32_t vi4 __attribute__((vector_size(16)));
template <class F>
static inline int32_t reduced(vi x, F f) {
  vi8 a = f(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
  vi4 b = f(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7));
  b = f(b, __builtin_shufflevector(b, b, 2, 3, 0, 1));
  b = f(b, __builtin_shufflevector(b, b, 1, 0, 3, 2));
  return b[0];
}
static inline int32_t largest(vi x) {
  return reduced(x, [](auto a, auto b) { return a > b ? a : b; });
}
static inline int32_t total(vi x) {
  return reduced(x, [](auto a, auto b) { return a + b; });
}

static inline int64_t reached(int64_t count) { return count < 2 ? count : (count + 7) & -8; }  // by the rows of by_rows
static inline int64_t aligned(int64_t bytes) { return (bytes + 63) & -64; }
static inline int64_t spread(int64_t bytes) { return aligned(bytes) | 64; }  // rows so far apart do not meet in the cache

static inline void put_all(float* out, vf y) { store(out, y); }
static inline void put_all(bf16* out, vf y) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh((__m512)y));
#else
  store(out, y);
#endif
}

// A result of sixteen columns, or of what is left of them.
template <typename T>
static inline void put(T* out, vf y, int64_t count) {
  if (count >= PANEL)
    put_all(out, y);
  else
    for (int64_t n = 0; n < count; n++) narrow(out + n, y[n]);
}

// Sixteen numbers, or what is left of them and zeros.
template <typename T>
static inline vf some(const T* from, int64_t count) {
  if (count >= PANEL) return load(from);
  vf x = vf{};
  for (int64_t n = 0; n < count; n++) x[n] = widen(from[n]);
  return x;
}

struct Output {  // [M, width] of either type; a bias of either, or none
  void* to;
  const void* bias;
  int64_t width, dtype, bias_dtype;
  vf bias_at(int64_t n) const {
    if (!bias) return vf{};
    return bias_dtype == BF16 ? some((const bf16*)bias + n, width - n) : some((const float*)bias + n, width - n);
  }
  void put_at(int64_t m, int64_t n, vf y) const {
    if (dtype == BF16)
      put((bf16*)to + m * width + n, y, width - n);
    else
      put((float*)to + m * width + n, y, width - n);
  }
};
