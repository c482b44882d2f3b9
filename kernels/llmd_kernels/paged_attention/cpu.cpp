// Flash attention over a paged KV cache. A unit of work is one tile of a row's queries times one KV head; the heads that
// share it are folded into the tile, so decode (one query) and prefill (many) run the same code:
//
//   for each tile of 64 positions:   K -> transposed float32 [D][64], V -> float32 [64][D]      once for the whole tile
//     S[M][64] = Q K^T               queries broadcast against 16 positions at a time
//     online softmax                 float32 running maximum and sum
//     O[M][D] += P V
//
// Tiles start at multiples of 64 from position 0, so a row's result does not depend on how its prompt was chunked nor on
// what else is in the batch. Decodes over long contexts are split into fixed parts of 1024 positions, merged in order.
#include "common.h"
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

constexpr int64_t TILE = 64;         // positions of K and V at once
constexpr int64_t MAX_ROWS = 128;    // queries x group in a tile
constexpr int64_t PART = 1024;       // positions in a part of a split decode
constexpr float LOW = -1e30f;

struct Args {
  void* out;
  const void *q, *keys, *values;
  const bf16 *key_scales, *value_scales;  // of a token's head; null where the cache is not quantized
  const int32_t* block_table;
  const int64_t* rows;
  const int32_t *query_start, *seq_lens;
  const float *sinks, *slopes;  // for each query head, or null
  float scale, soft_cap;        // soft_cap 0: none
  int64_t num_rows, num_tokens, heads, kv_heads, dim, block_size, table_stride, q_stride, block_stride, token_stride,
      head_stride, scale_stride, window;
};

struct Unit {  // queries [first, first + count) of `row`, one KV head, positions [begin, end)
  int64_t row, first, count, head, begin, end, part, num_parts, group_id;
};

struct Scratch {  // a thread's own; widths in floats, every line a multiple of 16
  std::vector<float> data;
  float *q, *k, *v, *s, *o, *high, *total, *key_scales, *value_scales;
  Scratch(int64_t dim, int64_t padded) : data(MAX_ROWS * (dim + padded + TILE + 2) + TILE * (dim + padded + 2) + L) {
    float* p = (float*)(((uintptr_t)data.data() + 63) / 64 * 64);
    q = p, p += MAX_ROWS * dim;
    o = p, p += MAX_ROWS * padded;
    s = p, p += MAX_ROWS * TILE;
    k = p, p += dim * TILE;
    v = p, p += TILE * padded;
    high = p, p += MAX_ROWS;
    total = p, p += MAX_ROWS;
    key_scales = p, p += TILE;
    value_scales = p;
  }
};

// C[M][64] (+)= A[M][depth] * B[depth][64], A broadcast.
template <int M, bool ADD>
static void block(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth) {
  vf acc[M * 4];
  EACH(i, M * 4) acc[i] = ADD ? load(c + i / 4 * c_stride + i % 4 * L) : vf{}; END
  for (int64_t k = 0; k < depth; k++) {
    vf line[4];
    EACH(n, 4) line[n] = load(b + k * b_stride + n * L); END
    EACH(m, M)
      vf x = splat(a[m * a_stride + k]);
      EACH(n, 4) acc[m * 4 + n] += x * line[n]; END
    END
  }
  EACH(i, M * 4) store(c + i / 4 * c_stride + i % 4 * L, acc[i]); END
}

template <bool ADD>
static inline void narrow_block(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                int64_t depth, int64_t rows) {
  for (int64_t m = 0; m < rows; m++) {  // one vector wide: what is left when the width is no multiple of 64
    vf acc = ADD ? load(c + m * c_stride) : vf{};
    for (int64_t k = 0; k < depth; k++) acc += splat(a[m * a_stride + k]) * load(b + k * b_stride);
    store(c + m * c_stride, acc);
  }
}

template <bool ADD>
static void multiply(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                     int64_t depth, int64_t rows, int64_t width) {
  int64_t n = 0;
  for (; n + 64 <= width; n += 64) {
    int64_t m = 0;
    for (; m + 6 <= rows; m += 6) block<6, ADD>(c + m * c_stride + n, c_stride, a + m * a_stride, a_stride, b + n, b_stride, depth);
    switch (rows - m) {
      case 5: block<5, ADD>(c + m * c_stride + n, c_stride, a + m * a_stride, a_stride, b + n, b_stride, depth); break;
      case 4: block<4, ADD>(c + m * c_stride + n, c_stride, a + m * a_stride, a_stride, b + n, b_stride, depth); break;
      case 3: block<3, ADD>(c + m * c_stride + n, c_stride, a + m * a_stride, a_stride, b + n, b_stride, depth); break;
      case 2: block<2, ADD>(c + m * c_stride + n, c_stride, a + m * a_stride, a_stride, b + n, b_stride, depth); break;
      case 1: block<1, ADD>(c + m * c_stride + n, c_stride, a + m * a_stride, a_stride, b + n, b_stride, depth); break;
    }
  }
  for (; n < width; n += L) narrow_block<ADD>(c + n, c_stride, a, a_stride, b + n, b_stride, depth, rows);
}

// 16 lines of 16 floats, transposed in place by four rounds of pairwise swaps.
static inline void transpose(vf* x) {
#define SWAP(d, lo, hi)                                \
  for (int i = 0; i < L; i++)                          \
    if (!(i & d)) {                                    \
      vf a = x[i], b = x[i + d];                       \
      x[i] = __builtin_shuffle(a, b, lo);              \
      x[i + d] = __builtin_shuffle(a, b, hi);          \
    }
  const vi lo8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, hi8 = lo8 + 8;
  const vi lo4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}, hi4 = lo4 + 4;
  const vi lo2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, hi2 = lo2 + 2;
  const vi lo1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}, hi1 = lo1 + 1;
  SWAP(8, lo8, hi8) SWAP(4, lo4, hi4) SWAP(2, lo2, hi2) SWAP(1, lo1, hi1)
#undef SWAP
}

static inline vf tanh_(vf x) {
  vf e = exp_((vf)((vi)x & 0x7fffffff) * -2.0f);
  return (vf)((vi)((1.0f - e) / (1.0f + e)) | ((vi)x & (int32_t)0x80000000));
}

template <typename T>
static inline vf load_some(const T* p, int64_t n) {
  if (n >= L) return load(p);
  float x[L] = {};
  for (int64_t i = 0; i < n; i++) x[i] = widen(p[i]);
  return load(x);
}

// Positions [at, at + count) of one head into k [D][TILE], transposed, and v [TILE][padded]; what is past count is zero.
// Scales are kept apart: there are fewer scores than numbers to multiply.
template <typename T>
static void fetch(const Args& g, const Unit& u, int64_t at, int64_t count, int64_t padded, Scratch& w) {
  const T* keys = (const T*)g.keys + u.head * g.head_stride;
  const T* values = (const T*)g.values + u.head * g.head_stride;
  const int32_t* table = g.block_table + g.rows[u.row] * g.table_stride;
  for (int64_t t = 0; t < TILE && t < (count + L - 1) / L * L; t += L) {
    const T* line[L];
    for (int64_t i = 0; i < L; i++) {
      int64_t position = at + t + i;
      bool real = t + i < count;
      int64_t block = real ? table[position / g.block_size] : 0, token = position % g.block_size;
      int64_t offset = block * g.block_stride + token * g.token_stride;
      line[i] = real ? keys + offset : nullptr;
      float* v = w.v + (t + i) * padded;
      for (int64_t d = 0; d < g.dim; d += L) store(v + d, real ? load_some(values + offset + d, g.dim - d) : vf{});
      if constexpr (sizeof(T) == 1) {
        int64_t scale = block * g.scale_stride + token * g.kv_heads + u.head;
        w.key_scales[t + i] = real ? widen(g.key_scales[scale]) : 0;
        w.value_scales[t + i] = real ? widen(g.value_scales[scale]) : 0;
      }
    }
    for (int64_t d = 0; d < g.dim; d += L) {
      vf x[L];
      for (int i = 0; i < L; i++) x[i] = line[i] ? load_some(line[i] + d, g.dim - d) : vf{};
      transpose(x);
      for (int64_t i = 0; i < L && d + i < g.dim; i++) store(w.k + (d + i) * TILE + t, x[i]);
    }
  }
}

static inline float max_of(vf x) {
  float s[L], top = LOW;
  store(s, x);
  for (int i = 0; i < L; i++) top = s[i] > top ? s[i] : top;
  return top;
}

// Mask, maximum, exponentials and the rescaling of O for one line of S; `from` and `to` bound what the query may see.
static inline void soften(float* s, float* o, float& high, float& total, int64_t from, int64_t to, int64_t width, int64_t padded) {
  if (to <= from) {
    for (int64_t n = 0; n < width; n += L) store(s + n, vf{});
    return;
  }
  for (int64_t n = 0; n < from; n++) s[n] = LOW;
  for (int64_t n = to; n < width; n++) s[n] = LOW;
  vf top = splat(LOW);
  for (int64_t n = 0; n < width; n += L) {
    vf x = load(s + n);
    vi more = x > top;
    top = (vf)(((vi)x & more) | ((vi)top & ~more));
  }
  float next = std::max(high, max_of(top));
  vf sums = vf{};
  for (int64_t n = 0; n < width; n += L) {
    vf p = exp_(load(s + n) - next);
    store(s + n, p);
    sums += p;
  }
  if (next > high) {
    vf shrink = exp_(splat(high - next));
    total *= shrink[0];
    for (int64_t d = 0; d < padded; d += L) store(o + d, load(o + d) * shrink);
    high = next;
  }
  total += sum(sums);
}

// What changes a line of scores before the softmax: the soft cap, then a slope times the distance; `ahead` of the query.
static inline void reshape(const Args& g, float* s, int64_t head, int64_t ahead, int64_t width) {
  const vf lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float slope = g.slopes ? g.slopes[head] : 0, inverse = g.soft_cap ? 1 / g.soft_cap : 0;
  for (int64_t n = 0; n < width; n += L) {
    vf x = load(s + n);
    if (g.soft_cap) x = tanh_(x * inverse) * g.soft_cap;
    if (g.slopes) x += (lanes + (float)(ahead + n)) * slope;
    store(s + n, x);
  }
}

static inline void times(float* s, const float* scales, int64_t width) {
  for (int64_t n = 0; n < width; n += L) store(s + n, load(s + n) * load(scales + n));
}

template <typename Q, typename T>
static void work(const Args& g, const Unit& u, int64_t padded, Scratch& w) {
  const int64_t group = g.heads / g.kv_heads, rows = u.count * group;
  const int64_t start = g.query_start[u.row], length = g.seq_lens[u.row];
  const int64_t before = length - (g.query_start[u.row + 1] - start);  // positions computed in earlier steps
  for (int64_t m = 0; m < rows; m++) {
    const Q* q = (const Q*)g.q + (start + u.first + m / group) * g.q_stride + (u.head * group + m % group) * g.dim;
    for (int64_t d = 0; d < g.dim; d++) w.q[m * g.dim + d] = widen(q[d]) * g.scale;
    const bool sinks = g.sinks && u.part == 0;  // a score more, of nothing
    w.high[m] = sinks ? g.sinks[u.head * group + m % group] : LOW, w.total[m] = sinks ? 1 : 0;
  }
  memset(w.o, 0, rows * padded * sizeof(float));
  for (int64_t at = u.begin / TILE * TILE; at < u.end; at += TILE) {
    int64_t count = std::min(TILE, u.end - at), width = (count + L - 1) / L * L;
    fetch<T>(g, u, at, count, padded, w);
    multiply<false>(w.s, TILE, w.q, g.dim, w.k, TILE, g.dim, rows, width);
    for (int64_t m = 0; m < rows; m++) {
      int64_t position = before + u.first + m / group;
      if constexpr (sizeof(T) == 1) times(w.s + m * TILE, w.key_scales, width);
      if (g.soft_cap || g.slopes) reshape(g, w.s + m * TILE, u.head * group + m % group, at - position, width);
      int64_t from = g.window ? std::max<int64_t>(0, position - g.window + 1 - at) : 0;
      soften(w.s + m * TILE, w.o + m * padded, w.high[m], w.total[m], std::min(from, width),
             std::min(position + 1 - at, count), width, padded);
      if constexpr (sizeof(T) == 1) times(w.s + m * TILE, w.value_scales, width);
    }
    multiply<true>(w.o, padded, w.s, TILE, w.v, padded, count, rows, padded);
  }
}

template <typename Q>
static void write(const Args& g, const Unit& u, const float* o, const float* total, int64_t padded) {
  const int64_t group = g.heads / g.kv_heads, start = g.query_start[u.row];
  for (int64_t m = 0; m < u.count * group; m++) {
    Q* out = (Q*)g.out + ((start + u.first + m / group) * g.heads + u.head * group + m % group) * g.dim;
    float scale = total[m] > 0 ? 1.0f / total[m] : 0;
    for (int64_t d = 0; d < g.dim; d++) narrow(out + d, o[m * padded + d] * scale);
  }
}

static std::vector<Unit> plan(const Args& g, int64_t& num_split) {
  std::vector<Unit> units;
  const int64_t group = g.heads / g.kv_heads, step = std::max<int64_t>(1, std::min<int64_t>(32, MAX_ROWS / group));
  num_split = 0;
  for (int64_t r = 0; r < g.num_rows; r++) {
    const int64_t count = g.query_start[r + 1] - g.query_start[r], length = g.seq_lens[r];
    for (int64_t first = 0; first < count; first += step) {
      const int64_t some = std::min(step, count - first), position = length - count + first;
      const int64_t begin = g.window ? std::max<int64_t>(0, position - g.window + 1) : 0, end = position + some;
      const int64_t lowest = count == 1 ? begin / PART : 0;
      const int64_t parts = count == 1 ? (end + PART - 1) / PART - lowest : 1;
      for (int64_t h = 0; h < g.kv_heads; h++) {
        for (int64_t p = 0; p < parts; p++)
          units.push_back({r, first, some, h, parts > 1 ? std::max(begin, (lowest + p) * PART) : begin,
                           parts > 1 ? std::min(end, (lowest + p + 1) * PART) : end, p, parts, num_split});
        if (parts > 1) num_split += parts;
      }
    }
  }
  return units;
}

// Partial results of a split decode: for each part `group` lines of O, the maxima and the sums.
template <typename Q>
static void merge(const Args& g, const Unit& u, float* partial, int64_t padded) {
  const int64_t group = g.heads / g.kv_heads, size = group * (padded + 2);
  float* first = partial + u.group_id * size;
  float *o = first, *high = first + group * padded, *total = high + group;
  for (int64_t p = 1; p < u.num_parts; p++) {
    const float *o2 = first + p * size, *high2 = o2 + group * padded, *total2 = high2 + group;
    for (int64_t m = 0; m < group; m++) {
      float top = std::max(high[m], high2[m]), a = std::exp(high[m] - top), b = std::exp(high2[m] - top);
      for (int64_t d = 0; d < padded; d++) o[m * padded + d] = o[m * padded + d] * a + o2[m * padded + d] * b;
      total[m] = total[m] * a + total2[m] * b, high[m] = top;
    }
  }
  write<Q>(g, u, o, total, padded);
}

template <typename Q, typename T>
static void run(const Args& g) {
  const int64_t padded = (g.dim + L - 1) / L * L, group = g.heads / g.kv_heads, size = group * (padded + 2);
  int64_t num_split, positions = 0;
  const std::vector<Unit> units = plan(g, num_split);
  for (const Unit& u : units) positions += (u.end - u.begin) * (1 + u.count / 4);
  team(units.size() > 1 ? positions * g.dim * 4 : 0, [&] {
    Scratch w(g.dim, padded);
    float* partial = nullptr;  // one for the whole team
    if (num_split) {
#pragma omp single copyprivate(partial)
      partial = new float[num_split * size];
    }
    // Long tiles of a prompt come last in their row: hand out from the end, so that the longest start first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = (int64_t)units.size() - 1; i >= 0; i--) {
      const Unit& u = units[i];
      work<Q, T>(g, u, padded, w);
      if (u.num_parts == 1) {
        write<Q>(g, u, w.o, w.total, padded);
        continue;
      }
      float* to = partial + (u.group_id + u.part) * size;
      memcpy(to, w.o, group * padded * sizeof(float));
      memcpy(to + group * padded, w.high, group * sizeof(float));
      memcpy(to + group * (padded + 1), w.total, group * sizeof(float));
    }
    if (!num_split) return;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)units.size(); i++)
      if (units[i].num_parts > 1 && units[i].part == 0) merge<Q>(g, units[i], partial, padded);
#pragma omp single
    delete[] partial;
  });
}

template <typename Q>
static void choose(const Args& g, int64_t kv_dtype) {
  switch (kv_dtype) {
    case F32: return run<Q, float>(g);
    case BF16: return run<Q, bf16>(g);
    case I8: return run<Q, int8_t>(g);
    case E4M3: return run<Q, e4m3>(g);
  }
}

EXPORT void llmd_paged_attention(void* out, const void* q, const void* keys, const void* values, const void* key_scales,
                                 const void* value_scales, const int32_t* block_table, const int64_t* rows,
                                 const int32_t* query_start, const int32_t* seq_lens, const float* sinks,
                                 const float* slopes, float scale, float soft_cap, int64_t num_rows, int64_t num_tokens,
                                 int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size, int64_t table_stride,
                                 int64_t q_stride, int64_t block_stride, int64_t token_stride, int64_t scale_stride,
                                 int64_t window, int64_t dtype, int64_t kv_dtype) {
  Args g{out, q, keys, values, (const bf16*)key_scales, (const bf16*)value_scales, block_table, rows, query_start, seq_lens,
         sinks, slopes, scale, soft_cap, num_rows, num_tokens, heads, kv_heads, dim, block_size, table_stride, q_stride,
         block_stride, token_stride, dim, scale_stride, window};
  dtype == BF16 ? choose<bf16>(g, kv_dtype) : choose<float>(g, kv_dtype);
}
REPLAYABLE(llmd_paged_attention)
