// The products of attention: scores of queries and keys, and the mix of values, over tiles of positions that lie anywhere.
//
// Products take steps of 32 bits. Pairs: two bfloat16 by VDPBF16PS, whose sums are float32. Singles: one float32, for
// queries that are float32 and for processors without that instruction. In both one side is broadcast from where it lies
// and the other is a vector, so that nothing is transposed and no sum needs a reduction.
#pragma once
#include "lines.h"
#include <array>
#include <cstdlib>

constexpr int64_t TILE = 64;        // positions of K and V at once
constexpr int64_t DEEP = 8;         // positions of K at once: to a multiple of them a tile is cut short
constexpr int64_t WIDE = 2 * L;     // dims of V at once
constexpr int64_t MAX_LINES = 128;  // queries, each with each head of a KV head
#ifdef __AVX512F__
constexpr int SCORE_VECTORS = 3, MIX_LINES = 12;  // as many as the registers hold sums of
#else
constexpr int SCORE_VECTORS = 1, MIX_LINES = 2;
#endif

struct Singles {
  typedef float Item;
  static constexpr int64_t ITEMS = 1;
  template <class W>
  static typename W::F dot(typename W::F acc, typename W::F a, typename W::F b) { return acc + a * b; }
  // 32 dims of the values of a step.
  static void values(const char* const* positions, int64_t step, int64_t d, vf& low, vf& high) {
    const float* line = (const float*)positions[step] + d;
    low = load(line), high = load(line + L);
  }
  // The weights of positions i and i + 1, as steps in the place of the scores.
  template <class W>
  static void keep(float* s, int64_t width, int64_t i, typename W::F even, typename W::F odd) {
    put<W>(s + i * width, even), put<W>(s + (i + 1) * width, odd);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
struct Pairs {  // of neighbours in a line of Q and K, of two positions of P and V
  typedef bf16 Item;
  static constexpr int64_t ITEMS = 2;
  template <class W>
  static typename W::F dot(typename W::F acc, typename W::F a, typename W::F b) {
    if constexpr (W::N == 16)
      return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
    else
      return (typename W::F)_mm256_dpbf16_ps((__m256)acc, (__m256bh)a, (__m256bh)b);
  }
  static void values(const char* const* positions, int64_t step, int64_t d, vf& low, vf& high) {
    const vi at = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, both = at | (at + 32) << 16;
    __m512i even = _mm512_loadu_si512((const bf16*)positions[2 * step] + d);
    __m512i odd = _mm512_loadu_si512((const bf16*)positions[2 * step + 1] + d);
    low = (vf)_mm512_permutex2var_epi16(even, (__m512i)both, odd);
    high = (vf)_mm512_permutex2var_epi16(even, (__m512i)(both + 0x100010), odd);
  }
  template <class W>
  static void keep(float* s, int64_t width, int64_t i, typename W::F even, typename W::F odd) {
    if constexpr (W::N == 16) {
      const vi at = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
      put<W>(s + i / 2 * width, (vf)_mm512_permutexvar_epi16((__m512i)(at | (at + 16) << 16), both));
    } else {
      const typename W::I at = {0, 1, 2, 3, 4, 5, 6, 7};
      __m256i both = (__m256i)_mm256_cvtne2ps_pbh((__m256)odd, (__m256)even);
      put<W>(s + i / 2 * width, (typename W::F)_mm256_permutexvar_epi16((__m256i)(at | (at + 8) << 16), both));
    }
  }
};
static inline void store_wide(bf16* p, vf low, vf high) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#else
typedef Singles Pairs;
#endif
static inline void store_wide(float* p, vf low, vf high) { store(p, low), store(p + L, high); }

// A line of the cache to what the products take, zeros behind it.
template <typename I, typename T>
static inline void widen_line(I* to, const T* from, int64_t dim, int64_t padded) {
  for (int64_t d = 0; d < padded; d += WIDE) {
    const int64_t n = dim - d;
    store_wide(to + d, n > 0 ? load_some(from + d, n) : vf{}, n > L ? load_some(from + d + L, n - L) : vf{});
  }
}
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
// What 128 codes of eight bits stand for without their sign, as the bytes of a bfloat16.
template <typename T>
struct Codes {
  alignas(64) uint8_t low[128], high[128];
  Codes() {
    for (int i = 0; i < 128; i++) {
      bf16 x;
      T code;
      const uint8_t bits = (uint8_t)i;
      memcpy(&code, &bits, 1), narrow(&x, widen(code));
      low[i] = (uint8_t)x, high[i] = (uint8_t)(x >> 8);
    }
  }
};
template <typename T>
static inline std::enable_if_t<sizeof(T) == 1> widen_line(bf16* to, const T* from, int64_t dim, int64_t padded) {
  if (dim % 64 || dim != padded) return widen_line<bf16, T>(to, from, dim, padded);
  static const Codes<T> codes;
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), sign = _mm512_set1_epi8((char)0x80);
  const __m512i low0 = _mm512_load_si512(codes.low), low1 = _mm512_load_si512(codes.low + 64);
  const __m512i high0 = _mm512_load_si512(codes.high), high1 = _mm512_load_si512(codes.high + 64);
  for (int64_t d = 0; d < dim; d += 64) {
    const __m512i x = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from + d));  // for unpack works in quarters
    const __m512i size = std::is_same_v<T, int8_t> ? _mm512_abs_epi8(x) : x;
    const __m512i low = _mm512_permutex2var_epi8(low0, size, low1);
    const __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(high0, size, high1), _mm512_and_si512(x, sign));
    _mm512_storeu_si512(to + d, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(to + d + 32, _mm512_unpackhi_epi8(low, high));
  }
}
#endif

// Where a tile's positions are; those outside a unit of work are zeros.
struct Tile {
  const char *keys[TILE], *values[TILE];
  const bf16 *key_scales[TILE], *value_scales[TILE];  // where the cache has them
};

// A thread's own memory, kept from call to call.
template <class T>
struct Room {
  T* data = nullptr;
  int64_t size = 0;
  T* of(int64_t wanted) {
    if (wanted > size) {
      free(data);
      size = wanted + wanted / 2;
      data = (T*)aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64);
    }
    return data;
  }
  ~Room() { free(data); }
};

// What a thread works with. `lines` is how many there are, `width` how many there is room for: a multiple of the vector.
template <class A>
struct Scratch {
  int64_t lines, width, steps, padded;
  float *q, *s, *o, *high, *total, *shrink, *slopes;  // q [steps][width], s [TILE][width], o [lines][padded]
  int32_t* places;                                    // a line's position
  float key_scales[TILE], value_scales[TILE];
  Tile cached[2], wide;  // in the cache, this tile and the one to come; this one as widened
  const Tile *now, *next;  // what the products take; what is asked for from memory meanwhile
  const void* found;       // the unit whose first tile `next` is
  int64_t bytes;           // of a position in the cache
  char* zeros;
  Room<float> room;

  void prepare(int64_t dim, int64_t item) {
    padded = (dim + WIDE - 1) / WIDE * WIDE, bytes = dim * item;
    float* p = room.of(MAX_LINES * (2 * padded + TILE + 5) + (2 * TILE + 1) * padded);
    q = p, p += MAX_LINES * padded;
    o = p, p += MAX_LINES * padded;
    s = p, p += MAX_LINES * TILE;
    high = p, p += MAX_LINES;
    total = p, p += MAX_LINES;
    shrink = p, p += MAX_LINES;
    slopes = p, p += MAX_LINES;
    places = (int32_t*)p, p += MAX_LINES;
    for (int64_t i = 0; i < TILE; i++, p += 2 * padded) wide.keys[i] = (char*)p, wide.values[i] = (char*)(p + padded);
    zeros = (char*)memset(p, 0, padded * sizeof(float));
    next = nullptr, found = nullptr;
  }
};

// Bytes [from, to) of positions that will be read soon, into the second level of the cache.
static inline void ask(const char* const* positions, int64_t count, int64_t from, int64_t to) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t b = from; b < to; b += 64) __builtin_prefetch(positions[i] + b, 0, 2);
}

// M positions against N vectors of lines; even and odd steps are summed apart, for each would wait for the one before.
template <class A, class W, int M, int N>
static void score(float* s, int64_t width, const char* const* keys, const float* q, int64_t steps) {
  typename W::F acc[2 * M * N];
  const char* key[M];
  EACH(m, M) key[m] = keys[m]; END
  EACH(i, 2 * M * N) acc[i] = typename W::F{}; END
  for (int64_t i = 0; i < steps; i += 2) {
    EACH(odd, 2)
      typename W::F line[N];
      EACH(n, N) line[n] = get<W>(q + (i + odd) * width + n * W::N); END
      EACH(m, M)
        typename W::F x = spread<W>(key[m] + (i + odd) * 4);
        EACH(n, N) acc[(m * N + n) * 2 + odd] = A::template dot<W>(acc[(m * N + n) * 2 + odd], x, line[n]); END
      END
    END
  }
  EACH(i, M * N) put<W>(s + i / N * width + i % N * W::N, acc[2 * i] + acc[2 * i + 1]); END
}

template <class A, class W, int M, int N>
static void scores(const Scratch<A>& w, int64_t n, int64_t depth) {
  for (int64_t i = 0; i < depth; i += M) {
    score<A, W, M, N>(w.s + i * w.width + n, w.width, w.now->keys + i, w.q + n, w.steps);
    if (n == 0 && w.next) ask(w.next->keys + i, M, 0, w.bytes);
  }
}

// S [depth][width] = K Q^T.
template <class A>
static void all_scores(const Scratch<A>& w, int64_t depth) {
  if (w.width == Eight::N) return scores<A, Eight, DEEP, 1>(w, 0, depth);
  int64_t n = 0;
  for (; n + SCORE_VECTORS * L <= w.width; n += SCORE_VECTORS * L) scores<A, Sixteen, 4, SCORE_VECTORS>(w, n, depth);
  switch ((w.width - n) / L) {
    case 1: return scores<A, Sixteen, 4, 1>(w, n, depth);
    case 2: return scores<A, Sixteen, 4, 2>(w, n, depth);
  }
}

// M lines of O, 32 dims of them.
template <class A, int M>
static void mix(const Scratch<A>& w, int64_t line, int64_t d, int64_t steps) {
  vf acc[2 * M];
  float* o = w.o + line * w.padded + d;
  EACH(m, M)
    vf shrink = splat(w.shrink[line + m]);
    acc[2 * m] = load(o + m * w.padded) * shrink, acc[2 * m + 1] = load(o + m * w.padded + L) * shrink;
  END
  for (int64_t i = 0; i < steps; i++) {
    vf low, high;
    A::values(w.now->values, i, d, low, high);
    EACH(m, M)
      vf p = spread<Sixteen>(w.s + i * w.width + line + m);
      acc[2 * m] = A::template dot<Sixteen>(acc[2 * m], p, low);
      acc[2 * m + 1] = A::template dot<Sixteen>(acc[2 * m + 1], p, high);
    END
  }
  EACH(m, M) store(o + m * w.padded, acc[2 * m]), store(o + m * w.padded + L, acc[2 * m + 1]); END
}

template <class A, size_t... M>
static void mix_some(const Scratch<A>& w, int64_t line, int64_t count, int64_t d, int64_t steps, std::index_sequence<M...>) {
  typedef void (*Way)(const Scratch<A>&, int64_t, int64_t, int64_t);
  static constexpr std::array<Way, sizeof...(M)> ways = {&mix<A, M + 1>...};
  ways[count - 1](w, line, d, steps);
}

// O [lines][padded] = O shrunk + P V.
template <class A>
static void mix_all(const Scratch<A>& w, int64_t steps) {
  for (int64_t d = 0; d < w.padded; d += WIDE) {
    if (w.next) ask(w.next->values, TILE, w.bytes * d / w.padded, w.bytes * (d + WIDE) / w.padded);
    for (int64_t line = 0; line < w.lines; line += MIX_LINES) {
      const int64_t left = w.lines - line;
      mix_some(w, line, left < MIX_LINES ? left : MIX_LINES, d, steps, std::make_index_sequence<MIX_LINES>());
    }
  }
}
