// Flash attention over a paged KV cache, which is read where it lies. A unit of work is a tile of a row's queries times one
// KV head; each query with each of the heads that share it is a line, so decode (one query) and prefill (many) run the
// same code:
//
//   for each tile of 64 positions:
//     S[64][lines] = K Q^T            numbers of K broadcast, against 8 or 16 lines at a time
//     online softmax, base 2          a line is a lane, so that maxima and sums need no reduction
//     O[lines][D] = O shrunk + P V    numbers of P broadcast, against 32 dims at a time
//
// Where queries are bfloat16 and the processor multiplies pairs of them, P is rounded to bfloat16, as on GPUs. A cache of
// another kind than the products want is widened a tile at a time; meanwhile the next tile is on its way from memory.
//
// Tiles start at multiples of 64 from position 0 and every sum has one order, so a row's result does not depend on how its
// prompt was chunked nor on what else is in the batch. Decodes over long contexts are split into fixed parts of 1024
// positions, merged in order.
#include "attention.h"
#include <algorithm>
#include <cmath>

constexpr int64_t PART = 1024;    // positions in a part of a split decode
constexpr float LOW = -1e30f;     // the maximum of nothing
constexpr float HIDDEN = -3e38f;  // a score that is not seen, far below it

struct Args {
  void* out;
  const void *q, *keys, *values;
  const bf16 *key_scales, *value_scales;  // of a token's head; null where the cache is not quantized
  const int32_t* block_table;
  const int64_t* rows;
  const int32_t *query_start, *seq_lens;
  const float *sinks, *slopes;  // for each query head, or null
  float scale, soft_cap;        // soft_cap 0: none
  int64_t num_rows, heads, kv_heads, dim, block_size, table_stride, q_stride, block_stride, token_stride, scale_stride,
      window;
  int64_t group() const { return heads / kv_heads; }
  bool reshapes() const { return soft_cap || slopes || key_scales || scale <= 0; }
};

struct Unit {  // queries [first, first + count) of `row`, one KV head, positions [begin, end)
  int64_t row, first, count, head, begin, end, part, num_parts, group_id;
  int64_t cost() const { return (end - begin + TILE) * (1 + count / 4); }
};

// What some models and caches do to scores before the softmax; they come out times log2 e.
template <class W>
static inline void reshape(const Args& g, float* s, int64_t width, int64_t at, int64_t depth, const float* scales,
                           const float* slopes, const int32_t* places) {
  typedef typename W::F F;
  const float inverse = g.soft_cap ? 1 / g.soft_cap : 0;
  F slope = get<W>(slopes), place = __builtin_convertvector(*(const typename W::I*)places, F);
  for (int64_t i = 0; i < depth; i++) {
    F x = get<W>(s + i * width) * g.scale;
    if (g.key_scales) x *= scales[i];
    if (g.soft_cap) x = tanh_<W>(x * inverse) * g.soft_cap;
    if (g.slopes) x += ((float)(at + i) - place) * slope;
    put<W>(s + i * width, x * LOG2E);
  }
}

template <class W>
static inline void hide(float* s, int64_t width, int64_t at, int64_t depth, int64_t window, const int32_t* places) {
  typedef typename W::I I;
  I last = *(const I*)places - (int32_t)at, before = last - (int32_t)std::min<int64_t>(window ? window : 1 << 30, 1 << 30);
  for (int64_t i = 0; i < depth; i++) {
    I seen = (last >= (int32_t)i) & (before < (int32_t)i);
    put<W>(s + i * width, seen ? get<W>(s + i * width) : typename W::F{} + HIDDEN);
  }
}

// A tile's scores become weights; what came before is to shrink as the maximum grew.
template <class A, class W>
static void soften(const Args& g, Scratch<A>& w, int64_t n, int64_t at, int64_t depth, bool all_seen) {
  typedef typename W::F F;
  const int64_t width = w.width;
  const float* value_scales = g.value_scales ? w.value_scales : nullptr;
  float* s = w.s + n;
  float factor = g.scale * LOG2E;
  if (g.reshapes()) reshape<W>(g, s, width, at, depth, w.key_scales, w.slopes + n, w.places + n), factor = 1;
  if (!all_seen) hide<W>(s, width, at, depth, g.window, w.places + n);
  F top = get<W>(s), before = get<W>(w.high + n), sums = F{};
  for (int64_t i = 1; i < depth; i++) {
    F x = get<W>(s + i * width);
    top = x > top ? x : top;
  }
  top *= factor;
  top = top > before ? top : before;
  for (int64_t i = 0; i < depth; i += 2) {
    F even = exp2_<W>(get<W>(s + i * width) * factor - top), odd = exp2_<W>(get<W>(s + (i + 1) * width) * factor - top);
    sums += even + odd;
    if (value_scales) even *= value_scales[i], odd *= value_scales[i + 1];
    A::template keep<W>(s, width, i, even, odd);
  }
  F shrink = exp2_<W>(before - top);
  put<W>(w.high + n, top), put<W>(w.shrink + n, shrink);
  put<W>(w.total + n, get<W>(w.total + n) * shrink + sums);
}

// Finds the positions of one head from `at` on.
template <typename T>
static void find(const Args& g, const Unit& u, int64_t at, const char* zeros, Tile& tile) {
  const int32_t* table = g.block_table + g.rows[u.row] * g.table_stride;
  const int64_t first = std::max<int64_t>(u.begin - at, 0), last = std::min(u.end - at, TILE);
  for (int64_t i = 0; i < TILE; i++)
    if (i < first || i >= last)
      tile.keys[i] = tile.values[i] = zeros, tile.key_scales[i] = tile.value_scales[i] = (const bf16*)zeros;
  for (int64_t i = first; i < last;) {
    const int64_t index = (at + i) / g.block_size, block = table[index], token = at + i - index * g.block_size;
    const int64_t end = std::min(last, (index + 1) * g.block_size - at);
    int64_t offset = block * g.block_stride + token * g.token_stride + u.head * g.dim;
    int64_t scale = block * g.scale_stride + token * g.kv_heads + u.head;
    if constexpr (sizeof(T) == 1) __builtin_prefetch(g.key_scales + scale), __builtin_prefetch(g.value_scales + scale);
    for (; i < end; i++, offset += g.token_stride, scale += g.kv_heads) {
      tile.keys[i] = (const char*)((const T*)g.keys + offset), tile.values[i] = (const char*)((const T*)g.values + offset);
      if constexpr (sizeof(T) == 1) tile.key_scales[i] = g.key_scales + scale, tile.value_scales[i] = g.value_scales + scale;
    }
  }
}

// Makes a tile that was found what the products take: it is already, or it is widened.
template <class A, typename T>
static void take(const Args& g, int64_t depth, const Tile& tile, Scratch<A>& w) {
  typedef typename A::Item Item;
  w.now = &tile;
  if (std::is_same_v<T, Item> && w.padded == g.dim) return;
  w.now = &w.wide;
  for (int64_t i = 0; i < depth; i++) {
    const int64_t dim = tile.keys[i] == w.zeros ? 0 : g.dim;
    widen_line((Item*)w.wide.keys[i], (const T*)tile.keys[i], dim, w.padded);
    widen_line((Item*)w.wide.values[i], (const T*)tile.values[i], dim, w.padded);
    if constexpr (sizeof(T) == 1) w.key_scales[i] = widen(*tile.key_scales[i]), w.value_scales[i] = widen(*tile.value_scales[i]);
  }
}

// One line of queries into q [step][line].
template <class A, typename Q>
static inline void lay(const Q* q, int64_t dim, int64_t width, typename A::Item* to) {
  constexpr int64_t N = A::ITEMS;
  int64_t d = 0;
  if constexpr (std::is_same_v<Q, typename A::Item>)
    for (; d + N <= dim; d += N) memcpy(to + d * width, q + d, N * sizeof(Q));
  for (; d < dim; d++) narrow(to + d / N * width * N + d % N, widen(q[d]));
}

// The queries as the products want them, and where the softmax of each line begins.
template <class A, typename Q>
static void begin(const Args& g, const Unit& u, Scratch<A>& w) {
  const int64_t group = g.group(), start = g.query_start[u.row];
  const int64_t before = g.seq_lens[u.row] - (g.query_start[u.row + 1] - start);  // positions computed in earlier steps
  w.lines = u.count * group, w.width = w.lines <= Eight::N ? Eight::N : (w.lines + L - 1) / L * L;
  w.steps = (g.dim + 2 * A::ITEMS - 1) / (2 * A::ITEMS) * 2;
  memset(w.q, 0, w.steps * w.width * sizeof(float));
  memset(w.o, 0, w.lines * w.padded * sizeof(float));
  for (int64_t m = 0; m < w.width; m++) {
    const bool is_line = m < w.lines, has_sink = is_line && g.sinks && u.part == 0;  // a score more, of nothing
    const int64_t head = u.head * group + m % group, query = u.first + (is_line ? m / group : 0);
    w.high[m] = has_sink ? g.sinks[head] * LOG2E : LOW, w.total[m] = has_sink ? 1 : 0;
    w.slopes[m] = is_line && g.slopes ? g.slopes[head] : 0;
    w.places[m] = (int32_t)(before + query);
    const Q* q = (const Q*)g.q + (start + query) * g.q_stride + head * g.dim;
    if (is_line) lay<A>(q, g.dim, w.width, (typename A::Item*)w.q + m * A::ITEMS);
  }
}

// The other tile of `cached` becomes `next`: of this unit, of the one `then` (if any), or none.
template <class A, typename T>
static void look_ahead(const Args& g, const Unit& u, const Unit* then, int64_t at, Scratch<A>& w) {
  Tile& other = w.cached[w.next == w.cached];
  if (at < u.end)
    find<T>(g, u, at, w.zeros, other);
  else if (then)
    find<T>(g, *then, then->begin / TILE * TILE, w.zeros, other), w.found = then;
  w.next = at < u.end || then ? &other : nullptr;
}

// `then`: the unit that this thread works on next, where it is known.
template <class A, typename Q, typename T>
static void work(const Args& g, const Unit& u, const Unit* then, Scratch<A>& w) {
  const int64_t start = u.begin / TILE * TILE;
  if (w.found != &u) {
    find<T>(g, u, start, w.zeros, w.cached[0]), w.next = w.cached;
    ask(w.next->keys, TILE, 0, w.bytes), ask(w.next->values, TILE, 0, w.bytes);
  }
  begin<A, Q>(g, u, w);
  const int64_t first = w.places[0], last = w.places[w.lines - 1];
  for (int64_t at = start; at < u.end; at += TILE) {
    const int64_t depth = (std::min(TILE, u.end - at) + DEEP - 1) / DEEP * DEEP;
    const bool all_seen = at + depth <= std::min(first + 1, u.end) && at >= u.begin && (!g.window || at > last - g.window);
    const Tile& tile = *w.next;
    look_ahead<A, T>(g, u, then, at + TILE, w);
    take<A, T>(g, depth, tile, w);
    all_scores(w, depth);
    if (w.width == Eight::N)
      soften<A, Eight>(g, w, 0, at, depth, all_seen);
    else
      for (int64_t n = 0; n < w.width; n += L) soften<A, Sixteen>(g, w, n, at, depth, all_seen);
    mix_all(w, depth / A::ITEMS);
  }
}

template <typename Q>
static void write(const Args& g, const Unit& u, const float* o, const float* total, int64_t padded) {
  const int64_t group = g.group(), start = g.query_start[u.row];
  for (int64_t m = 0; m < u.count * group; m++, o += padded) {
    Q* out = (Q*)g.out + ((start + u.first + m / group) * g.heads + u.head * group + m % group) * g.dim;
    const float scale = total[m] > 0 ? 1.0f / total[m] : total[m] * 0;
    for (int64_t d = 0; d < g.dim; d += L) store_some(out + d, load(o + d) * scale, g.dim - d);
  }
}

// A step's units; each thread makes the same for itself.
struct Plan {
  Room<Unit> room;
  Unit* units;
  int64_t count, num_split, cost;  // parts of split decodes
  bool is_decode;

  void add(const Unit& u) { units[count++] = u, cost += u.cost(); }
  void make(const Args& g) {
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(32, MAX_LINES / g.group()));
    int64_t most = 0;
    for (int64_t r = 0; r < g.num_rows; r++)
      most += (g.query_start[r + 1] - g.query_start[r] + step - 1) / step + g.seq_lens[r] / PART + 1;
    units = room.of(most * g.kv_heads);
    count = num_split = cost = 0, is_decode = true;
    for (int64_t r = 0; r < g.num_rows; r++) {
      const int64_t queries = g.query_start[r + 1] - g.query_start[r];
      is_decode &= queries <= 1;
      for (int64_t first = 0; first < queries; first += step) add_tile(g, r, first, std::min(step, queries - first), queries);
    }
  }
  void add_tile(const Args& g, int64_t r, int64_t first, int64_t some, int64_t queries) {
    const int64_t position = g.seq_lens[r] - queries + first, end = position + some;
    const int64_t begin = g.window ? std::max<int64_t>(0, position - g.window + 1) : 0;
    const int64_t lowest = begin / PART, parts = queries == 1 ? (end + PART - 1) / PART - lowest : 1;
    for (int64_t p = 0; p < parts; p++)
      for (int64_t h = 0; h < g.kv_heads; h++)  // neighbours in memory: one after the other they find them in the cache
        add({r, first, some, h, parts > 1 ? std::max(begin, (lowest + p) * PART) : begin,
             parts > 1 ? std::min(end, (lowest + p + 1) * PART) : end, p, parts, num_split + h * parts});
    if (parts > 1) num_split += parts * g.kv_heads;
  }
  // Where the share of a thread begins: neighbours, of about the same cost as each other's.
  int64_t start_of(int64_t thread, int64_t threads) const {
    int64_t i = 0;
    for (int64_t before = 0; i < count && (before + units[i].cost() / 2) * threads < cost * thread; i++)
      before += units[i].cost();
    return i;
  }
};

// Partial results of a split decode: for each part `group` lines of O, the maxima and the sums.
template <typename Q>
static void merge(const Args& g, const Unit& u, float* partial, int64_t padded) {
  const int64_t group = g.group(), size = group * (padded + 2);
  float* first = partial + u.group_id * size;
  float *o = first, *high = first + group * padded, *total = high + group;
  for (int64_t p = 1; p < u.num_parts; p++) {
    const float *o2 = first + p * size, *high2 = o2 + group * padded, *total2 = high2 + group;
    for (int64_t m = 0; m < group; m++) {
      float top = std::max(high[m], high2[m]), a = std::exp2(high[m] - top), b = std::exp2(high2[m] - top);
      for (int64_t d = m * padded; d < (m + 1) * padded; d += L) store(o + d, load(o + d) * a + load(o2 + d) * b);
      total[m] = total[m] * a + total2[m] * b, high[m] = top;
    }
  }
  write<Q>(g, u, o, total, padded);
}

template <class A, typename Q, typename T>
static void finish(const Args& g, const Unit& u, const Unit* then, Scratch<A>& w, float* partial) {
  work<A, Q, T>(g, u, then, w);
  if (u.num_parts == 1) return write<Q>(g, u, w.o, w.total, w.padded);
  const int64_t group = g.group();
  float* to = partial + (u.group_id + u.part) * group * (w.padded + 2);
  memcpy(to, w.o, group * w.padded * sizeof(float));
  memcpy(to + group * w.padded, w.high, group * sizeof(float));
  memcpy(to + group * (w.padded + 1), w.total, group * sizeof(float));
}

template <class A, typename Q, typename T>
static void share(const Args& g) {
  static thread_local Plan plan;
  static thread_local Scratch<A> w;
  plan.make(g), w.prepare(g.dim, sizeof(T));
  float* partial = nullptr;  // one for the whole team
  if (plan.num_split) {
#pragma omp single copyprivate(partial)
    partial = (float*)malloc(plan.num_split * g.group() * (w.padded + 2) * sizeof(float));
  }
  const Unit* units = plan.units;
  if (plan.is_decode) {  // many and small: to each thread its share at once
    const int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num(), end = plan.start_of(mine + 1, threads);
    for (int64_t i = plan.start_of(mine, threads); i < end; i++)
      finish<A, Q, T>(g, units[i], i + 1 < end ? &units[i + 1] : nullptr, w, partial);
#pragma omp barrier
  } else {  // the longest tiles of a prompt come last in their row: they are handed out first
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = plan.count - 1; i >= 0; i--) finish<A, Q, T>(g, units[i], nullptr, w, partial);
  }
  if (!plan.num_split) return;
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < plan.count; i++)
    if (units[i].num_parts > 1 && units[i].part == 0) merge<Q>(g, units[i], partial, w.padded);
#pragma omp single nowait
  free(partial);
}

template <class A, typename Q, typename T>
static void run(const Args& g) {
  int64_t bytes = 0;
  for (int64_t r = 0; r < g.num_rows; r++)
    bytes += g.seq_lens[r] * (1 + (g.query_start[r + 1] - g.query_start[r]) / 4) * g.kv_heads * g.dim * 4;
  team(bytes, [&] { share<A, Q, T>(g); });
}

template <typename Q>
static void choose(const Args& g, int64_t kv_dtype) {
  typedef std::conditional_t<std::is_same_v<Q, bf16>, Pairs, Singles> A;
  switch (kv_dtype) {
    case F32: return run<Singles, Q, float>(g);
    case BF16: return run<A, Q, bf16>(g);
    case I8: return run<A, Q, int8_t>(g);
    case E4M3: return run<A, Q, e4m3>(g);
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
         sinks, slopes, scale, soft_cap, num_rows, heads, kv_heads, dim, block_size, table_stride, q_stride,
         block_stride, token_stride, scale_stride, window};
  dtype == BF16 ? choose<bf16>(g, kv_dtype) : choose<float>(g, kv_dtype);
}
REPLAYABLE(llmd_paged_attention)
