// A token for each row of logits: greedy, drawn, or drawn from what top_k, top_p and min_p leave, as in the package. Weights
// are fixed-point integers, so sums are the same in any order; no row is sorted, cuts are found by weighted selection.
#include "common.h"
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

constexpr int64_t BLOCK = 128;         // tokens whose sums and maxima are kept
constexpr float ONE = 0x1p40f;         // the weight of the likeliest token
constexpr float NO_WEIGHT = -28.0f;    // e^-28 < 2^-40
typedef int64_t vl __attribute__((vector_size(128)));

struct Wish {  // of a row
  float inverse;  // of the temperature; 0: greedy
  int64_t top_k;
  double top_p;
  float min_p;
};

struct Candidate {
  float value, relative;  // to the likeliest token's probability
  int64_t id, weight;
};

struct Scratch {  // a thread's own
  std::vector<float> maxima, ranked;
  std::vector<int64_t> sums;
  std::vector<Candidate> candidates, chosen;
};

static inline uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

static inline double uniform(int64_t seed, int64_t counter) {
  const uint64_t golden = 0x9E3779B97F4A7C15ull;
  return (double)(mix(mix((uint64_t)seed + golden) + mix((uint64_t)counter * golden + 1)) >> 11) * 0x1p-53;
}

static inline int64_t target_of(double uniform, int64_t total) {
  return std::max<int64_t>(0, std::min((int64_t)(uniform * (double)total), total - 1));
}

// Sixteen logits; behind the last one minus infinity.
template <typename T>
static inline vf take(const T* x, int64_t left) {
  if (left >= L) return load(x);
  float some[L];
  for (int64_t i = 0; i < L; i++) some[i] = i < left ? widen(x[i]) : -INFINITY;
  return load(some);
}

// The largest logit; a NaN where there is one. Each block's maximum is kept.
template <typename T>
static float scan(const T* x, int64_t width, std::vector<float>& maxima) {
  maxima.resize((width + BLOCK - 1) / BLOCK);
  vi broken = vi{};
  float best = -INFINITY;
  for (int64_t b = 0; b < (int64_t)maxima.size(); b++) {
    vf top = splat(-INFINITY);
    for (int64_t i = b * BLOCK, end = std::min(width, i + BLOCK); i < end; i += L) {
      const vf some = take(x + i, end - i);
      broken |= some != some;
      top = some > top ? some : top;
    }
    float most = top[0];
    for (int i = 1; i < L; i++) most = top[i] > most ? top[i] : most;
    maxima[b] = most;
    best = most > best ? most : best;
  }
  for (int i = 0; i < L; i++)
    if (broken[i]) return NAN;
  return best;
}

template <typename T>
static int64_t first_of(const T* x, int64_t width, float best, const std::vector<float>& maxima) {
  const int64_t block = std::find(maxima.begin(), maxima.end(), best) - maxima.begin();
  for (int64_t i = block * BLOCK; i < std::min(width, (block + 1) * BLOCK); i++)
    if (widen(x[i]) == best) return i;
  return 0;
}

static inline vf relative_of(vf x, float best, float inverse) { return exp_((x - best) * inverse); }
static inline vl weight_of(vf relative) { return __builtin_convertvector(relative * ONE, vl); }

// The weights of a block; their sum.
template <typename T>
static int64_t weigh(int64_t* weights, const T* x, int64_t count, float best, float inverse) {
  vl sum = vl{};
  for (int64_t i = 0; i < count; i += L) {
    const vl some = weight_of(relative_of(take(x + i, count - i), best, inverse));
    memcpy(weights + i, &some, sizeof(vl));
    sum += some;
  }
  int64_t total = 0;
  for (int i = 0; i < L; i++) total += sum[i];
  return total;
}

// The sum of all weights; each block's is kept.
template <typename T>
static int64_t weigh_all(const T* x, int64_t width, float best, float inverse, Scratch& s) {
  int64_t weights[BLOCK], total = 0;
  s.sums.resize(s.maxima.size());
  for (int64_t b = 0; b < (int64_t)s.sums.size(); b++) {
    const bool any = (s.maxima[b] - best) * inverse >= NO_WEIGHT;
    s.sums[b] = any ? weigh(weights, x + b * BLOCK, std::min(BLOCK, width - b * BLOCK), best, inverse) : 0;
    total += s.sums[b];
  }
  return total;
}

template <typename T>
static int64_t draw(const T* x, int64_t width, float best, float inverse, double uniform, Scratch& s) {
  int64_t weights[BLOCK], target = target_of(uniform, weigh_all(x, width, best, inverse, s)), b = 0, i = 0;
  while (target >= s.sums[b]) target -= s.sums[b++];
  weigh(weights, x + b * BLOCK, std::min(BLOCK, width - b * BLOCK), best, inverse);
  while (target >= weights[i]) target -= weights[i++];
  return b * BLOCK + i;
}

// The tokens that have a weight and a logit of `least` or more, in the order of their ids.
template <typename T>
static void gather(const T* x, int64_t width, float best, float inverse, float least, Scratch& s) {
  s.candidates.clear();
  for (int64_t b = 0; b < (int64_t)s.maxima.size(); b++) {
    if (s.maxima[b] < least) continue;
    for (int64_t i = b * BLOCK, end = std::min(width, i + BLOCK); i < end; i += L) {
      const vf values = take(x + i, end - i), relative = relative_of(values, best, inverse);
      const vl weights = weight_of(relative);
      for (int j = 0; j < L; j++)
        if (weights[j] > 0 && values[j] >= least) s.candidates.push_back({values[j], relative[j], i + j, weights[j]});
    }
  }
}

// The largest value t such that the amounts of the entries >= t reach `target`, which all of them together do.
template <typename Amount>
static float value_reaching(std::vector<Candidate>& all, int64_t target, Amount amount) {
  Candidate *begin = all.data(), *end = begin + all.size();
  while (true) {
    const float a = begin->value, b = begin[(end - begin) / 2].value, c = end[-1].value;
    const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    Candidate* above = std::partition(begin, end, [=](const Candidate& some) { return some.value > pivot; });
    int64_t sum = 0;
    for (Candidate* some = begin; some < above; some++) sum += amount(*some);
    if (sum >= target) {
      end = above;
      continue;
    }
    Candidate* below = std::partition(above, end, [=](const Candidate& some) { return some.value == pivot; });
    for (Candidate* some = above; some < below; some++) sum += amount(*some);
    if (sum >= target || below == end) return pivot;
    target -= sum, begin = below;
  }
}

template <typename Stays>
static void keep(std::vector<Candidate>& all, Stays stays) {
  all.erase(std::remove_if(all.begin(), all.end(), [=](const Candidate& c) { return !stays(c); }), all.end());
}

static int64_t weight_of_all(const std::vector<Candidate>& all) {
  int64_t total = 0;
  for (const Candidate& c : all) total += c.weight;
  return total;
}

// Of the candidates those that are among the top_k of all tokens and pass min_p. A logit below the k-th largest maximum of
// a block is not among the k largest.
template <typename T>
static void cut_by_rank(const T* x, int64_t width, float best, const Wish& wish, Scratch& s) {
  float least = best + NO_WEIGHT / wish.inverse;
  if (wish.min_p > 0) least = std::max(least, best + (std::log(wish.min_p) - 0.01f) / wish.inverse);
  if (wish.top_k < (int64_t)s.maxima.size()) {
    s.ranked = s.maxima;
    std::nth_element(s.ranked.begin(), s.ranked.begin() + wish.top_k - 1, s.ranked.end(), std::greater<float>());
    least = std::max(least, s.ranked[wish.top_k - 1]);
  }
  gather(x, width, best, wish.inverse, least, s);
  if (wish.top_k < (int64_t)s.candidates.size()) {
    s.chosen = s.candidates;
    const float kth = value_reaching(s.chosen, wish.top_k, [](const Candidate&) { return 1; });
    keep(s.candidates, [=](const Candidate& c) { return c.value >= kth; });
  }
  if (wish.min_p > 0) keep(s.candidates, [=](const Candidate& c) { return c.relative >= wish.min_p; });
}

// Of the candidates those that make up a share of `total`, which they reach.
static void cut_by_share(double top_p, int64_t total, Scratch& s) {
  s.chosen = s.candidates;
  const int64_t share = std::min((int64_t)std::ceil(top_p * (double)total), total);
  const float least = value_reaching(s.chosen, share, [](const Candidate& c) { return c.weight; });
  keep(s.candidates, [=](const Candidate& c) { return c.value >= least; });
}

// A share of all tokens: the few likeliest are tried first.
template <typename T>
static void cut_by_share_of_all(const T* x, int64_t width, float best, const Wish& wish, Scratch& s) {
  const int64_t total = weigh_all(x, width, best, wish.inverse, s);
  for (float depth : {-5.0f, -12.0f, NO_WEIGHT}) {
    gather(x, width, best, wish.inverse, best + depth / wish.inverse, s);
    if ((double)weight_of_all(s.candidates) >= std::ceil(wish.top_p * (double)total)) break;
  }
  cut_by_share(wish.top_p, total, s);
}

static int64_t draw_candidate(const Scratch& s, double uniform) {
  int64_t target = target_of(uniform, weight_of_all(s.candidates));
  for (const Candidate& c : s.candidates) {
    if (target < c.weight) return c.id;
    target -= c.weight;
  }
  return 0;
}

template <typename T>
static int64_t sample(const T* x, int64_t width, const Wish& wish, double uniform, float& best, Scratch& s) {
  best = scan(x, width, s.maxima);
  if (!std::isfinite(best)) return 0;  // a token without meaning
  if (wish.inverse == 0) return first_of(x, width, best, s.maxima);
  if (wish.top_k >= width && wish.top_p >= 1 && wish.min_p <= 0) return draw(x, width, best, wish.inverse, uniform, s);
  if (wish.top_k >= width && wish.min_p <= 0) {
    cut_by_share_of_all(x, width, best, wish, s);
  } else {
    cut_by_rank(x, width, best, wish, s);
    if (wish.top_p < 1) cut_by_share(wish.top_p, weight_of_all(s.candidates), s);
  }
  return draw_candidate(s, uniform);
}

// `values` [line][4]: 1 / temperature, top_k, top_p, min_p.
EXPORT void llmd_sample(int64_t* tokens, float* best, const void* logits, const int64_t* rows, const int64_t* num_tokens,
                        const int64_t* seeds, const double* values, int64_t count, int64_t width, int64_t stride,
                        int64_t dtype) {
  team(count > 1 ? count * width * 4 : 0, [=] {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
      const double* v = values + rows[i] * 4;
      const Wish wish{(float)v[0], (int64_t)v[1], v[2], (float)v[3]};
      const double u = uniform(seeds[rows[i]], num_tokens[i]);
      tokens[i] = dtype == BF16 ? sample((const bf16*)logits + i * stride, width, wish, u, best[i], scratch)
                                : sample((const float*)logits + i * stride, width, wish, u, best[i], scratch);
    }
  });
}
REPLAYABLE(llmd_sample)
