// A mixture of experts in one team. A place is a pair of a token and one of its experts; places are sorted by expert:
//
//     plan      which tokens an expert has, and where each token's pairs are
//     take      a place's row of x, as the product wants it
//     multiply  the places of each expert that has any by its W, in units of some columns of one expert
//     gate      the activation, and what it gives taken as rows of the second product
//     multiply  again
//     add_up    each token's rows in the order of its slots, in float32
//
// Products are those of the linears (dense.h, int8.h, grouped.h, fp8.h), so a row's bits hang on its expert's other rows no
// more than a linear's on its batch.
#include "experts.h"
#include "gates.h"

using namespace experts;

namespace {  // others have words like these too

// Which unit is an expert's how many-th; asked in rising order.
template <class S>
struct Cursor {
  const S& share;
  const Used* used;
  int64_t before = 0;  // units of experts that were passed
  int64_t go(int64_t i) {
    for (int64_t units; i - before >= (units = share.units(*used)); used++) before += units;
    return i - before;
  }
};

template <class W, typename T>
static void multiply(const W& w, T* out, const Used* used, int64_t num_used) {
  const auto share = w.share(used, num_used);
  int64_t total = 0;
  for (int64_t i = 0; i < num_used; i++) total += share.units(used[i]);
  Cursor<typename W::Share> here{share, used}, next{share, used};
  const int64_t threads = omp_get_num_threads();
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < total; i++) {
    const int64_t unit = here.go(i), then = next.go(i + threads < total ? i + threads : total - 1);  // at a guess
    w.multiply(out, share, *here.used, unit, *next.used, then);
  }
}

// Where everything is.
struct Plan {
  int64_t num_used, num_places;
  Used* used;
  int64_t* starts;  // of experts' places
  int32_t *tokens, *experts;  // of a place
  int32_t* places;            // of a pair; -1 where there is no such expert

  static int64_t bytes(int64_t num_experts, int64_t pairs) {
    return aligned(sizeof(Plan) + num_experts * (sizeof(Used) + sizeof(int64_t)) + 3 * pairs * sizeof(int32_t));
  }
  void make(const int64_t* ids, int64_t pairs, int64_t k, int64_t num_experts) {
    used = (Used*)(this + 1), starts = (int64_t*)(used + num_experts);
    tokens = (int32_t*)(starts + num_experts), experts = tokens + pairs, places = experts + pairs;
    num_used = num_places = 0;
    const auto is_one = [=](int64_t id) { return id >= 0 && id < num_experts; };
    for (int64_t e = 0; e < num_experts; e++) starts[e] = 0;
    for (int64_t i = 0; i < pairs; i++)
      if (is_one(ids[i])) starts[ids[i]]++;
    for (int64_t e = 0; e < num_experts; e++)
      if (const int64_t count = starts[e]) {
        used[num_used++] = {e, num_places, count};
        starts[e] = num_places, num_places += count;
      }
    for (int64_t i = 0; i < pairs; i++) {
      places[i] = is_one(ids[i]) ? (int32_t)starts[ids[i]]++ : -1;
      if (places[i] >= 0) tokens[places[i]] = (int32_t)(i / k), experts[places[i]] = (int32_t)ids[i];
    }
  }
};

template <typename T>
struct Call {
  T* out;
  const T* x;
  const int64_t* ids;
  const float* weights;
  uint8_t* scratch;
  int64_t count, k, x_stride, activation;
};

template <typename T>
static inline void activate(T* y, const T* x, int64_t dim, int64_t activation) {
  switch (activation) {
    case SILU: return gate<SILU>(y, x, dim, 0, dim);
    case GELU: return gate<GELU>(y, x, dim, 0, dim);
    case GELU_TANH: return gate<GELU_TANH>(y, x, dim, 0, dim);
  }
}

// out[t] = the sum over its slots of weight * row, for columns from `begin` to `end`.
template <typename T>
static void add_up(T* out, const T* rows, const int32_t* places, const float* weights, int64_t k, int64_t width, int64_t begin,
                   int64_t end) {
  for (int64_t d = begin; d < end; d += L) {
    vf total = vf{};
    for (int64_t slot = 0; slot < k; slot++)
      if (places[slot] >= 0) total += weights[slot] * load_some(rows + places[slot] * width + d, end - d);
    store_some(out + d, total, end - d);
  }
}

// What a thread has to itself where the rows are few, so that none waits for another to sort and take them; else all share
// it. Rows that products give are everybody's; where rows are few those of the second lie behind those of the first, which
// other threads may still read.
struct Rooms {
  static constexpr int64_t OWN = 64 << 10;
  bool is_own;
  Plan* plan;
  uint8_t *read, *line, *given, *given_last;
  Rooms(uint8_t* own, uint8_t* scratch, int64_t plan_bytes, int64_t read_bytes, int64_t line_bytes, int64_t given_bytes) {
    is_own = plan_bytes + read_bytes + line_bytes <= OWN;
    uint8_t* const at = is_own ? own : scratch;
    plan = (Plan*)at, read = at + plan_bytes, line = read + read_bytes;
    given = is_own ? scratch : line, given_last = is_own ? given + given_bytes : given;
  }
};

template <template <typename> class W, typename T>
static void run(const Call<T>& c, const Table& gate_up, const Table& down) {
  const int64_t pairs = c.count * c.k, used = pairs < gate_up.count ? pairs : gate_up.count, inner = down.depth;
  const int64_t read_bytes = dense::most(W<T>::bytes(gate_up, pairs), W<T>::bytes(down, pairs));
  team(used * gate_up.depth * inner, [&] {
    alignas(64) uint8_t own[Rooms::OWN];
    const Rooms rooms(own, c.scratch, Plan::bytes(gate_up.count, pairs), read_bytes, aligned(inner * sizeof(T)),
                      aligned(pairs * 2 * inner * sizeof(T)));
    Plan& plan = *rooms.plan;
    const W<T> first(gate_up, rooms.read, pairs), second(down, rooms.read, pairs);
    T *const given = (T*)rooms.given, *const given_last = (T*)rooms.given_last;
    const auto take = [&](int64_t i) { first.take(i, plan.experts[i], c.x + plan.tokens[i] * c.x_stride); };
    const auto take_gated = [&](int64_t i) {
      T* const gated = rooms.is_own ? (T*)rooms.line : given + i * 2 * inner;
      activate(gated, given + i * 2 * inner, inner, c.activation);
      second.take(i, plan.experts[i], gated);
    };
    if (rooms.is_own) {
      plan.make(c.ids, pairs, c.k, gate_up.count);
      for (int64_t i = 0; i < plan.num_places; i++) take(i);
      multiply(first, given, plan.used, plan.num_used);
      for (int64_t i = 0; i < plan.num_places; i++) take_gated(i);
    } else {
#pragma omp single
      plan.make(c.ids, pairs, c.k, gate_up.count);
#pragma omp for
      for (int64_t i = 0; i < plan.num_places; i++) take(i);
      multiply(first, given, plan.used, plan.num_used);
#pragma omp for
      for (int64_t i = 0; i < plan.num_places; i++) take_gated(i);
    }
    multiply(second, given_last, plan.used, plan.num_used);
    const int64_t threads = omp_get_num_threads(), pieces = c.count < 4 * threads ? threads : 1;  // of a row
    const int64_t width = down.width, piece = ((width + pieces - 1) / pieces + 2 * L - 1) / (2 * L) * (2 * L);
#pragma omp for
    for (int64_t i = 0; i < c.count * pieces; i++) {
      const int64_t t = i / pieces, begin = i % pieces * piece, end = begin + piece < width ? begin + piece : width;
      add_up(c.out + t * width, given_last, plan.places + t * c.k, c.weights + t * c.k, c.k, width, begin, end);
    }
  });
}

template <typename T>
static void choose(const Call<T>& c, const Table& gate_up, const Table& down) {
  switch (gate_up.format) {
    case DENSE: return run<Dense>(c, gate_up, down);
    case INT8: return run<Int8>(c, gate_up, down);
    case GROUPED: return run<Grouped>(c, gate_up, down);
    case FP8: return run<Fp8>(c, gate_up, down);
  }
}

}  // namespace

// `scratch`: the plan, rows to be read, a line; rows that are given, of the first product and where pairs are few of the
// second too.
EXPORT void llmd_experts(void* out, const void* x, const int64_t* ids, const float* weights, const Table* gate_up,
                         const Table* down, uint8_t* scratch, int64_t count, int64_t k, int64_t x_stride, int64_t activation,
                         int64_t dtype) {
  if (dtype == BF16)
    choose<bf16>({(bf16*)out, (const bf16*)x, ids, weights, scratch, count, k, x_stride, activation}, *gate_up, *down);
  else
    choose<float>({(float*)out, (const float*)x, ids, weights, scratch, count, k, x_stride, activation}, *gate_up, *down);
}
REPLAYABLE(llmd_experts)

// ---- the router ----

constexpr int64_t MOST_EXPERTS = 4096;

// The k largest of `count` numbers and their softmax, of equal ones the first. Where one is infinite or not a number, so
// are all weights, and the first experts are as good as any.
static void route_one(int64_t* ids, float* weights, float* x, int64_t count, int64_t k, bool is_normalized) {
  const int64_t padded = (count + L - 1) / L * L;
  constexpr float TAKEN = -__builtin_inff(), LEAST = -3.40282347e38f;
  vi top = vi{};
  for (int64_t i = count; i < padded; i++) x[i] = TAKEN;
  for (int64_t i = 0; i < padded; i += L) {
    const vf some = load(x + i);
    top = larger(top, some == TAKEN ? vi{} : size_of(some));
  }
  if (largest(top) >= 0x7f800000) {
    for (int64_t j = 0; j < k; j++) ids[j] = j, weights[j] = __builtin_nanf("");
    return;
  }
  for (int64_t i = 0; i < count; i++) x[i] = x[i] < LEAST ? LEAST : x[i];
  float highest = 0, all = 0;
  for (int64_t j = 0; j < k; j++) {
    vf best = splat(TAKEN);
    for (int64_t i = 0; i < padded; i += L) {
      const vf some = load(x + i);
      best = some > best ? some : best;
    }
    float high = best[0];
    for (int i = 1; i < L; i++) high = best[i] > high ? best[i] : high;
    int64_t id = 0;
    while (x[id] != high) id++;
    if (j == 0) {
      vf sums = vf{};
      for (int64_t i = 0; i < padded; i += L) sums += exp_(load(x + i) - high);
      highest = high, all = sum(sums);
    }
    ids[j] = id, weights[j] = high, x[id] = TAKEN;
  }
  float chosen = 0;
  for (int64_t j = 0; j < k; j += L) {
    store_some(weights + j, exp_(load_some(weights + j, k - j) - highest), k - j);
    for (int64_t i = j; i < k && i < j + L; i++) chosen += weights[i];
  }
  const float scale = 1.0f / (is_normalized ? chosen : all);
  for (int64_t j = 0; j < k; j++) weights[j] *= scale;
}

EXPORT void llmd_route(int64_t* ids, float* weights, const void* logits, int64_t count, int64_t num_experts, int64_t stride,
                       int64_t k, int64_t is_normalized, int64_t dtype) {
  team(count * num_experts * k, [=] {
    alignas(64) float x[MOST_EXPERTS];
#pragma omp for
    for (int64_t t = 0; t < count; t++) {
      for (int64_t i = 0; i < num_experts; i += L)
        store(x + i, dtype == BF16 ? load_some((const bf16*)logits + t * stride + i, num_experts - i)
                                   : load_some((const float*)logits + t * stride + i, num_experts - i));
      route_one(ids + t * k, weights + t * k, x, num_experts, k, is_normalized);
    }
  });
}
REPLAYABLE(llmd_route)

// ---- an expert for all tokens ----

// out = y + x / (1 + e^-gate) of each row.
template <typename T>
static void add_gated(T* out, const T* y, const T* x, const T* gates, int64_t count, int64_t width) {
  team(count * width * (int64_t)sizeof(T), [=] {
#pragma omp for
    for (int64_t t = 0; t < count; t++) {
      const float gate = gated(splat(1.0f), splat(widen(gates[t])))[0];
      for (int64_t d = t * width, end = d + width; d < end; d += L)
        store_some(out + d, load_some(y + d, end - d) + gate * load_some(x + d, end - d), end - d);
    }
  });
}

EXPORT void llmd_add_gated(void* out, const void* y, const void* x, const void* gates, int64_t count, int64_t width,
                           int64_t dtype) {
  if (dtype == BF16)
    add_gated((bf16*)out, (const bf16*)y, (const bf16*)x, (const bf16*)gates, count, width);
  else
    add_gated((float*)out, (const float*)y, (const float*)x, (const float*)gates, count, width);
}
REPLAYABLE(llmd_add_gated)
