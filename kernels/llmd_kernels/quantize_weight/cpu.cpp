// Weights to 8 or 4 bits while a model loads: one pass over each row, which stays in the cache meanwhile.
#include "common.h"

// Sixteen numbers, or what is left of them and zeros.
template <typename T>
static inline vf taken(const T* from, int64_t count) {
  if (count >= L) return load(from);
  T rest[L] = {};
  for (int64_t k = 0; k < count; k++) rest[k] = from[k];
  return load(rest);
}

// The largest |w|; not a number, or infinite, where one of them is.
template <typename T>
static inline float largest(const T* row, int64_t depth) {
  vi top = vi{};  // the bits of |w| are ordered as it is, and a NaN is above all
  for (int64_t k = 0; k < depth; k += L) {
    const vi bits = (vi)taken(row + k, depth - k) & 0x7fffffff, more = bits > top;
    top = (bits & more) | (top & ~more);
  }
  int32_t highest = 0;
  for (int i = 0; i < L; i++) highest = top[i] > highest ? top[i] : highest;
  float most;
  memcpy(&most, &highest, 4);
  return most;
}

template <typename T>
static void channels(int8_t* q, float* scale, int32_t* sums, const T* w, int64_t count, int64_t depth) {
  team(count * depth * (int64_t)sizeof(T), [&] {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; n++) {
      const T* row = w + n * depth;
      const float wanted = largest(row, depth) / 127.0f, s = wanted < 1.17549435e-38f ? 1.17549435e-38f : wanted;
      scale[n] = s;
      vi sum = vi{};
      int8_t* to = q + n * depth;
      int64_t k = 0;
      for (; k + L <= depth; k += L) {
        const vi some = nearest(load(row + k) / s);
        put_bytes(to + k, some);
        sum += some;
      }
      if (k < depth) {
        const vi some = nearest(taken(row + k, depth - k) / s);
        for (int64_t i = 0; k + i < depth; i++) to[k + i] = some[i];
        sum += some;
      }
      sums[n] = 0;
      for (int i = 0; i < L; i++) sums[n] += sum[i];
    }
  });
}

// weight [count, depth] -> q, a scale for each row, so that its largest becomes 127, and the sums of the rows of q.
EXPORT void llmd_quantize_channels(int8_t* q, float* scale, int32_t* sums, const void* w, int64_t count, int64_t depth,
                                   int64_t dtype) {
  if (dtype == BF16) channels(q, scale, sums, (const bf16*)w, count, depth);
  else channels(q, scale, sums, (const float*)w, count, depth);
}

constexpr int LARGEST_GROUP = 128;
constexpr float SMALLEST = 0x1p-24f;  // of float16
constexpr float SHARES[] = {1.0f, 0.86f};

static inline vf chosen(vi where, vf a, vf b) { return (vf)((where & (vi)a) | (~where & (vi)b)); }

// What float16 makes of a number, to nearest, even at halves; never zero.
static inline vf storable(vf x) {
  const vi bits = (vi)x, size = bits & 0x7fffffff;
  vf wide = (vf)((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff);
  wide = chosen(size >= 0x477ff000, (vf)((bits & (int32_t)0x80000000) | 0x7f800000), wide);  // from 65520 on: infinite
  const vf tiny = (x + 0.75f) - 0.75f;  // whole multiples of 2^-24: the steps of 0.75
  const vf y = chosen(size < 0x38800000, tiny, wide), kept = chosen(x != x, x, y);
  return chosen(kept == vf{}, splat(SMALLEST), kept);
}

static inline vf rounded(vf w, vf inverse) {
  vf x = w * inverse;
  x = chosen(x < -8.0f, splat(-8.0f), x);
  x = chosen(x > 7.0f, splat(7.0f), x);
  return __builtin_convertvector(nearest(x), vf);
}

// Sixteen groups, a lane each, w[k] their k-th weights: the scale whose grid of -8 ... 7 leaves the least squared error.
static inline vf best_scale(const vf* w, int size) {
  vf highest = w[0], lowest = w[0];
  for (int k = 1; k < size; k++) {
    highest = chosen(w[k] > highest, w[k], highest);
    lowest = chosen(w[k] < lowest, w[k], lowest);
  }
  const vf most = chosen(highest > -lowest, highest, lowest);  // the grid's longer, negative side is where the largest is
  vf best = splat(__builtin_nanf("")), least = splat(__builtin_inff());
  for (float share : SHARES) {
    const vf inverse = 1.0f / storable(most * (share / -8.0f));
    vf products = vf{}, squares = vf{}, error = vf{};
    for (int k = 0; k < size; k++) {
      const vf r = rounded(w[k], inverse);
      products += w[k] * r;
      squares += r * r;
    }
    const vf scale = storable(products / chosen(squares < 1.0f, splat(1.0f), squares)), back = 1.0f / scale;
    for (int k = 0; k < size; k++) {
      const vf off = rounded(w[k], back) * scale - w[k];
      error += off * off;
    }
    const vi better = error < least;
    best = chosen(better, scale, best);
    least = chosen(better, error, least);
  }
  return best;
}

template <typename T>
static void groups(uint8_t* q, float* scale, const T* w, int64_t count, int64_t depth, int64_t size) {
  const int64_t num_groups = (depth + size - 1) / size;
  team(count * depth * (int64_t)sizeof(T), [&] {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; n++)
      for (int64_t first = 0; first < num_groups; first += L) {
        alignas(64) float in[LARGEST_GROUP][L];
        alignas(64) uint8_t out[LARGEST_GROUP][L];
        const int64_t some = num_groups - first < L ? num_groups - first : L;
        if (some < L || (first + L) * size > depth) memset(in, 0, sizeof in);
        for (int64_t g = 0; g < some; g++) {
          const int64_t begin = (first + g) * size, own = depth - begin < size ? depth - begin : size;
          for (int64_t k = 0; k < own; k++) in[k][g] = widen(w[n * depth + begin + k]);
        }
        const vf best = best_scale((const vf*)in, size), inverse = 1.0f / best;
        for (int k = 0; k < size; k++) put_bytes(out[k], nearest(rounded(load(in[k]), inverse)) + 8);
        for (int64_t g = 0; g < some; g++) {
          const int64_t begin = (first + g) * size, own = depth - begin < size ? depth - begin : size;
          for (int64_t k = 0; k < own; k++) q[n * depth + begin + k] = out[k][g];
          scale[n * num_groups + first + g] = best[g];
        }
      }
  });
}

// weight [count, depth] -> q = round(w / scale) + 8 in 0 ... 15, and a scale for each `size` of a row, a value of float16.
EXPORT void llmd_quantize_groups(uint8_t* q, float* scale, const void* w, int64_t count, int64_t depth, int64_t size,
                                 int64_t dtype) {
  if (dtype == BF16) groups(q, scale, (const bf16*)w, count, depth, size);
  else groups(q, scale, (const float*)w, count, depth, size);
}

// Words [count, words] of four features each -> [panels, words, 16], as panels.h has them; zeros for rows that are lacking.
EXPORT void llmd_pack_quads(int32_t* out, const int32_t* q, int64_t count, int64_t words) {
  team(count * words * 4, [&] {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < (count + L - 1) / L; panel++) {
      const int64_t some = count - panel * L < L ? count - panel * L : L;
      const int32_t* rows = q + panel * L * words;
      int32_t* to = out + panel * L * words;
      if (some < L) memset(to, 0, L * words * 4);
      for (int64_t k = 0; k < words; k += L) {
        const int64_t end = words - k < L ? words - k : L;
        for (int64_t r = 0; r < some; r++)
          for (int64_t i = 0; i < end; i++) to[(k + i) * L + r] = rows[r * words + k + i];
      }
    }
  });
}
