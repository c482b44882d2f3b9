// What ops do to a line of numbers of any length: its ends, RMSNorm, rotary position embedding.
#pragma once
#include "common.h"

// Sixteen numbers at once, of which n are there.
template <typename T>
static inline vf load_some(const T* p, int64_t n) {
  if (n >= L) return load(p);
  float x[L] = {};
  for (int64_t i = 0; i < n; i++) x[i] = widen(p[i]);
  return load(x);
}
template <typename T>
static inline void store_some(T* p, vf x, int64_t n) {
  if (n >= L) return store(p, x);
  T last[L];
  store(last, x);
  memcpy(p, last, n * sizeof(T));
}

// y = x / sqrt(mean(x^2) + eps) * w; y may be x.
template <typename T>
static inline void normalise(T* y, const T* x, const T* w, float eps, int64_t dim) {
  vf squares[4] = {};
  for (int64_t i = 0; i < dim; i += 4 * L) {
    EACH(n, 4)
      if (const int64_t at = i + n * L; at < dim) {
        vf v = load_some(x + at, dim - at);
        squares[n] += v * v;
      }
    END
  }
  const float scale = 1.0f / __builtin_sqrtf(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / dim + eps);
  for (int64_t i = 0; i < dim; i += L)
    store_some(y + i, load_some(x + i, dim - i) * scale * load_some(w + i, dim - i), dim - i);
}

// Pairs (i, i + half) of a head, turned in place.
template <typename T>
static inline void turn(T* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += L) {
    const int64_t n = half - i;
    vf a = load_some(head + i, n), b = load_some(head + half + i, n), c = load_some(cos + i, n), s = load_some(sin + i, n);
    store_some(head + i, a * c - b * s, n);
    store_some(head + half + i, b * c + a * s, n);
  }
}

// Where a position's cosines are in [max_position, rot], its sines behind them; what is outside counts as the nearest inside.
static inline const float* angles(const float* cos_sin, int64_t position, int64_t max_position, int64_t rot) {
  return cos_sin + (position < 0 ? 0 : position < max_position ? position : max_position - 1) * rot;
}
