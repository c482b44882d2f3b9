// Products with rows of W as the checkpoint has them; the number of rows of x says how they are read.
//   few    Dot products along K, four rows of W by up to four of x at a time, while the next rows of W come in from memory.
//          Every row of x gets the same bits however many there are.
//   many   Rows of W are transposed into a panel that stays in the cache, and all rows of x go by it: no sums over lanes.
#pragma once
#include "common.h"

#include <vector>

namespace dense {

template <typename E>
struct Product {
  const E *x, *w, *bias;
  int64_t count, width, depth, x_stride, w_stride;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Equal parts of some work, none above `limit`: the size of one, a multiple of `unit`.
static inline int64_t part_of(int64_t work, int64_t limit, int64_t unit) {
  const int64_t parts = most(1, (work + limit - 1) / limit), part = (work + parts - 1) / parts;
  return most(unit, (part + unit - 1) / unit * unit);
}

// How elements of x and W are multiplied: a lane holds PAIR neighbours along K.
template <typename E>
struct Lanes {
  static constexpr int PAIR = 1;
  static vf take(const E* p) { return load(p); }
  static vf take(const E* p, int64_t n) {
    float x[L] = {};
    for (int64_t i = 0; i < n; i++) x[i] = widen(p[i]);
    return load(x);
  }
#ifdef __AVX512F__  // rounded once, wherever the compiler puts it
  static vf dot(vf acc, vf a, vf b) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc); }
#else
  static vf dot(vf acc, vf a, vf b) { return acc + a * b; }
#endif
  static vf spread(const E* p) { return splat(widen(*p)); }
  static vf spread_last(const E* p) { return spread(p); }
};
#ifdef __AVX512BF16__
template <>
struct Lanes<bf16> {
  static constexpr int PAIR = 2;
  static vf take(const bf16* p) { return (vf)_mm512_loadu_si512(p); }
  static vf take(const bf16* p, int64_t n) { return (vf)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  static vf dot(vf acc, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
  static vf spread(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (vf)(vi{} + pair);
  }
  static vf spread_last(const bf16* p) { return (vf)(vi{} + *p); }
};
#endif
template <typename E>
constexpr int STEP = L * Lanes<E>::PAIR;  // elements of K at once

// Into the second level: the first would lose what is at work.
static inline void fetch(const void* p) { __builtin_prefetch(p, 0, 1); }

// ---- few rows of x ----

constexpr int FEW = 4;
constexpr int64_t MANY = 64;          // the most rows of x that are few, as measured
constexpr int64_t PIECE = 128 << 10;  // bytes of W that a thread takes at a time
constexpr int64_t BAND = 512 << 10;   // bytes of x that stay in the second level
constexpr int64_t LONG = 1536;        // elements of K of eight rows that stay in the first
constexpr int64_t FLUSH = 16;         // columns of the output that are written at a time
constexpr int64_t AHEAD = 2048;       // elements that a single row of x is ahead with fetching

// The sums of 16 vectors, with the same pairs as `sum`: lane 4 * m + n is that of acc[4 * n + m].
static inline vf sums(const vf (&acc)[FEW * FEW]) {
#ifdef __AVX512F__
  vf eight[8], four[4], two[2];
  EACH(i, 8)
    const vf a = acc[2 * i], b = acc[2 * i + 1];
    eight[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  END
  EACH(i, 4)
    const vf a = eight[2 * i], b = eight[2 * i + 1];
    four[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
              __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  END
  EACH(i, 2)
    const vf a = four[2 * i], b = four[2 * i + 1];
    two[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
             __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  END
  return __builtin_shufflevector(two[0], two[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(two[0], two[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#else
  vf y;
  for (int i = 0; i < FEW * FEW; i++) y[i % FEW * FEW + i / FEW] = sum(acc[i]);
  return y;
#endif
}

// Rows of W from some k on.
template <typename E>
struct Rows {
  const E* first;
  int64_t stride;
  const E* operator[](int64_t n) const { return first + n * stride; }
};

// M rows of x by four of W, from one k on. With one or two rows of x each row of W is read in turn, a single stream being
// what memory delivers fastest; with more, all four at once. What will be read next is fetched: four rows `ahead`. That is
// done again with the next rows of x, because the processor drops what it cannot queue.
// Products that go on with another part of K are `kept`; the last part returns the sums.
template <int M, bool IS_STREAM, typename E>
static __attribute__((noinline)) vf dots(vf* kept, bool is_first, bool is_last, const E* x, int64_t x_stride, Rows<E> w,
                                         Rows<E> ahead, int64_t depth) {
  typedef Lanes<E> A;
  vf acc[FEW * FEW];
  EACH(i, FEW * FEW) acc[i] = is_first ? vf{} : kept[i]; END
  const int64_t whole = depth / STEP<E> * STEP<E>, rest = depth - whole;
  if constexpr (IS_STREAM) {
    EACH(n, FEW)
      const E *row = w[n], *then = M == 1 ? row + AHEAD : n < 2 ? w[n + 2] : ahead[n - 2];
      for (int64_t k = 0; k < whole; k += STEP<E>) {
        const vf b = A::take(row + k);
        fetch(then + k);
        EACH(m, M) acc[FEW * n + m] = A::dot(acc[FEW * n + m], A::take(x + m * x_stride + k), b); END
      }
      if (rest) {
        const vf b = A::take(row + whole, rest);
        EACH(m, M) acc[FEW * n + m] = A::dot(acc[FEW * n + m], A::take(x + m * x_stride + whole, rest), b); END
      }
    END
  } else {
    const auto step = [&](auto load) __attribute__((always_inline)) {
      vf b[FEW];
      EACH(n, FEW) b[n] = load(w[n]); END
      EACH(m, M)
        const vf a = load(x + m * x_stride);
        EACH(n, FEW) acc[FEW * n + m] = A::dot(acc[FEW * n + m], a, b[n]); END
      END
    };
    for (int64_t k = 0; k < whole; k += STEP<E>) {
      EACH(n, FEW) fetch(ahead[n] + k); END
      step([=](const E* p) __attribute__((always_inline)) { return A::take(p + k); });
    }
    if (rest) step([=](const E* p) __attribute__((always_inline)) { return A::take(p + whole, rest); });
  }
  if (is_last) return sums(acc);
  EACH(i, FEW * FEW) kept[i] = acc[i]; END
  return vf{};
}
template <typename E>
using Dots = vf (*)(vf*, bool, bool, const E*, int64_t, Rows<E>, Rows<E>, int64_t);

// `count` rows of x by four of W, or by the same one as often, into columns of `out`; the rows from `next` on will probably
// follow. A long K is taken part by part, so that W's four rows stay in the first level for all rows of x.
template <typename T, typename E>
static void block(T* out, int64_t out_stride, const Product<E>& p, const E* x, int64_t count, int64_t n, int64_t some,
                  const E* next) {
  static constexpr Dots<E> ways[] = {dots<1, true, E>, dots<2, true, E>, dots<3, false, E>, dots<4, false, E>},
                           rest[] = {dots<1, false, E>, dots<2, false, E>};
  vf kept[(MANY + FEW - 1) / FEW][FEW * FEW];
  vf bias = {};
  if (p.bias)
    for (int i = 0; i < L; i++) bias[i] = widen(p.bias[n + (some == FEW ? i % FEW : 0)]);
  const int64_t part = p.count == 1 ? most(p.depth, 1) : part_of(p.depth, LONG, STEP<E>);
  for (int64_t k = 0; k == 0 || k < p.depth; k += part) {
    const bool is_last = k + part >= p.depth;
    const Rows<E> w{p.w + n * p.w_stride + k, some == FEW ? p.w_stride : 0};
    const Rows<E> ahead{is_last ? next : w[0] + part, p.w_stride};
    for (int64_t m = 0; m < count; m += FEW) {
      const int64_t left = least(FEW, count - m);
      const Dots<E> way = (left < 3 && p.count > FEW ? rest : ways)[left - 1];
      const vf y = way(kept[m / FEW], k == 0, is_last, x + m * p.x_stride + k, p.x_stride, w, ahead, least(part, p.depth - k));
      if (!is_last) continue;
      T flat[L];
      store(flat, y + bias);
      for (int64_t i = 0; i < left; i++) memcpy(out + (m + i) * out_stride, flat + FEW * i, FEW * sizeof(T));
    }
  }
}

// Rows of W that a thread takes at a time.
template <typename E>
static inline int64_t piece_of(const Product<E>& p) {
  return most(FEW, PIECE / most(1, p.depth * (int64_t)sizeof(E)) / FEW * FEW);
}

// All rows of x, MANY at most, by rows of W from `begin` to `end`; those from `after` on will probably follow.
template <typename T, typename E>
void few(T* out, const Product<E>& p, int64_t begin, int64_t end, const E* after) {
  const int64_t band = least(MANY, most(FEW, BAND / most(1, p.depth * (int64_t)sizeof(E)) / FEW * FEW));
  T flat[MANY][FLUSH];  // rows of the output lie far from each other: each is written to for several blocks at once
  for (int64_t m = 0; m < p.count; m += band) {
    const int64_t count = least(band, p.count - m);
    for (int64_t n = begin, some, filled = 0; n < end; n += some) {
      some = n + FEW <= end ? FEW : 1;
      const E* const next = n + some < end ? p.w + (n + some) * p.w_stride : after;
      block(flat[0] + filled, FLUSH, p, p.x + m * p.x_stride, count, n, some, next);
      filled += some;
      if (filled + FEW <= FLUSH && n + some < end) continue;
      T* const to = out + m * p.width + n + some - filled;
      for (int64_t i = 0; i < count; i++)
        if (filled == FLUSH)  // a size that the compiler knows
          memcpy(to + i * p.width, flat[i], FLUSH * sizeof(T));
        else
          memcpy(to + i * p.width, flat[i], filled * sizeof(T));
      filled = 0;
    }
  }
}

// ---- many rows of x ----

#ifdef __AVX512F__
constexpr int ROWS = 6, GROUPS = 4;  // 24 sums, four vectors of W and one of x: as many as there are registers
#else
constexpr int ROWS = 6, GROUPS = 1;
#endif
constexpr int64_t COLUMNS = GROUPS * L;
constexpr int64_t PANEL = 320 << 10;  // bytes
template <typename E>
constexpr int64_t MAX_DEPTH = PANEL / (COLUMNS * 4) / L * STEP<E>;
constexpr int64_t MAX_ROWS = 172 * ROWS;                                         // of x by one panel: a chunk of 1,024

// Lane j of to[i * GROUPS] becomes lane i of from[j].
static inline void transpose(vf* to, const vf (&from)[L]) {
#ifdef __AVX512F__
  vf two[L], four[L], eight[L];  // so many rows are together in their vectors
  EACH(i, 8)
    const vf a = from[2 * i], b = from[2 * i + 1];
    two[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    two[2 * i + 1] = __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  END
  EACH(i, 8)
    constexpr int j = i / 2 * 4 + i % 2, k = i / 2 * 4 + i % 2 * 2;
    four[k] = __builtin_shufflevector(two[j], two[j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    four[k + 1] = __builtin_shufflevector(two[j], two[j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  END
  EACH(i, 8)
    constexpr int j = i / 4 * 8 + i % 4;
    const vf a = four[j], b = four[j + 4];
    eight[j] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    eight[j + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  END
  EACH(i, 8)
    const vf a = eight[i], b = eight[i + 8];
    to[i * GROUPS] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    to[(i + 8) * GROUPS] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  END
#else
  for (int i = 0; i < L; i++)
    for (int j = 0; j < L; j++) ((float*)(to + i * GROUPS))[j] = from[j][i];
#endif
}

// COLUMNS rows of W, of which `some` exist, lane by lane of K.
template <typename E>
static void pack(vf* panel, const E* w, int64_t stride, int64_t some, int64_t depth) {
  typedef Lanes<E> A;
  for (int64_t g = 0; g < GROUPS; g++)
    for (int64_t k = 0; k < depth; k += STEP<E>) {
      vf rows[L];
      for (int64_t i = 0; i < L; i++) {
        const E* row = w + (g * L + i) * stride + k;
        rows[i] = g * L + i >= some ? vf{} : k + STEP<E> <= depth ? A::take(row) : A::take(row, depth - k);
      }
      transpose(panel + k / A::PAIR * GROUPS + g, rows);
    }
}

// ROWS rows of x by the panel, added to the sums so far unless these are the first. The rows of x after them are fetched,
// and `num_ahead` rows of W that will be packed next.
template <typename E>
static __attribute__((noinline)) void tile(float* sums, const E* x, int64_t stride, const vf* panel, int64_t depth,
                                           bool is_first, Rows<E> ahead, int64_t num_ahead) {
  typedef Lanes<E> A;
  vf acc[ROWS * GROUPS];
  EACH(i, ROWS * GROUPS) acc[i] = is_first ? vf{} : load(sums + i * L); END
  const auto step = [&](auto spread) __attribute__((always_inline)) {
    vf w[GROUPS];
    EACH(g, GROUPS) w[g] = panel[g]; END
    EACH(m, ROWS)
      const vf b = spread(x + m * stride);
      EACH(g, GROUPS) acc[m * GROUPS + g] = A::dot(acc[m * GROUPS + g], w[g], b); END
    END
    panel += GROUPS;
  };
  const int64_t whole = depth / A::PAIR * A::PAIR;
  for (int64_t k = 0; k < whole;) {
    EACH(m, ROWS) fetch(x + (m + ROWS) * stride + k); END
    for (int64_t n = 0; n < num_ahead; n++) fetch(ahead[n] + k);
    for (const int64_t end = least(k + STEP<E>, whole); k < end; k += A::PAIR)
      step([=](const E* p) __attribute__((always_inline)) { return A::spread(p + k); });
  }
  if (whole < depth) step([=](const E* p) __attribute__((always_inline)) { return A::spread_last(p + whole); });
  EACH(i, ROWS * GROUPS) store(sums + i * L, acc[i]); END
}

// The lines that `finish` will write are asked for before the work: memory has them by then.
template <typename T>
static void prepare(T* out, int64_t width, int64_t some) {
  for (int m = 0; m < ROWS; m++)
    for (int64_t n = 0; n < some; n += 64 / sizeof(T)) __builtin_prefetch(out + m * width + n, 1);
}

template <typename T, typename E>
static void finish(T* out, const float* sums, const E* bias, int64_t width, int64_t some) {
  for (int m = 0; m < ROWS; m++)
    for (int64_t n = 0; n < some; n += L) {
      const float* from = sums + m * COLUMNS + n;
      T* to = out + m * width + n;
      if (n + L <= some)
        store(to, bias ? load(from) + load(bias + n) : load(from));
      else
        for (int64_t i = 0; i < some - n; i++) narrow(to + i, from[i] + (bias ? widen(bias[n + i]) : 0));
    }
}

// A thread's panel, and the sums of its rows behind it.
static inline vf* room() {
  static thread_local std::vector<char> bytes;
  bytes.resize(64 + PANEL + COLUMNS * 4 * (MAX_ROWS + ROWS));
  return (vf*)(((uintptr_t)bytes.data() + 63) / 64 * 64);
}

// Rows of x from `begin` to `end`, ROWS at least and MAX_ROWS at most, by COLUMNS of W from n on; `num_after` rows of W
// from `after` on will probably follow. The last tile overlaps the one before, with sums of its own.
template <typename T, typename E>
void strip(T* out, const Product<E>& p, int64_t begin, int64_t end, int64_t n, const E* after, int64_t num_after) {
  vf* const panel = room();
  float* const sums = (float*)(panel + PANEL / sizeof(vf));
  const int64_t some = least(COLUMNS, p.width - n), num_tiles = (end - begin + ROWS - 1) / ROWS;
  const int64_t part = part_of(p.depth, MAX_DEPTH<E>, STEP<E>);
  for (int64_t k = 0; k == 0 || k < p.depth; k += part) {
    const bool is_last = k + part >= p.depth;
    const Rows<E> w{p.w + n * p.w_stride + k, p.w_stride};
    const Rows<E> ahead{is_last ? after : w[0] + part, p.w_stride};
    const int64_t num_ahead = is_last ? num_after : some, depth = least(part, p.depth - k);
    pack(panel, w[0], p.w_stride, some, depth);
    for (int64_t i = 0; i < num_tiles; i++) {
      const int64_t m = least(begin + i * ROWS, end - ROWS);
      const int64_t from = num_ahead * i / num_tiles, to = num_ahead * (i + 1) / num_tiles;
      float* const here = sums + (part < p.depth ? i * ROWS * COLUMNS : 0);
      if (is_last) prepare(out + m * p.width + n, p.width, some);
      tile(here, p.x + m * p.x_stride + k, p.x_stride, panel, depth, k == 0, {ahead[from], p.w_stride}, to - from);
      if (is_last) finish(out + m * p.width + n, here, p.bias ? p.bias + n : p.bias, p.width, some);
    }
  }
}

// Made in linear/cpu.cpp.
extern template void few(bf16*, const Product<bf16>&, int64_t, int64_t, const bf16*);
extern template void strip(bf16*, const Product<bf16>&, int64_t, int64_t, int64_t, const bf16*, int64_t);

}  // namespace dense
