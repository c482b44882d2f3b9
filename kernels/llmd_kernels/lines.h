// What ops do to a line of numbers of any length: its ends, powers, RMSNorm, rotary position embedding.
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

// Eight or sixteen lanes: vectors of floats, and of their bits.
struct Eight {
  static constexpr int N = 8;
  typedef float F __attribute__((vector_size(32), aligned(4)));
  typedef int32_t I __attribute__((vector_size(32), aligned(4)));
};
struct Sixteen {
  static constexpr int N = 16;
  typedef vf F;
  typedef vi I;
};
template <class W>
static inline typename W::F get(const void* p) { return *(const typename W::F*)p; }
template <class W>
static inline void put(void* p, typename W::F x) { *(typename W::F*)p = x; }
template <class W>
static inline typename W::F spread(const void* step) { return (typename W::F)(typename W::I{} + *(const int32_t*)step); }

// 2^x, relative error 2e-7, exact for whole numbers; anything below -127 gives 0, a NaN stays one.
template <class W>
static inline typename W::F exp2_(typename W::F x) {
  typedef typename W::F F;
  x = x < -127.0f ? F{} - 127.0f : x;
  F shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f), p = F{} + 1.32647264e-3f;
  p = p * r + 9.6715127e-3f;
  p = p * r + 5.55073375e-2f;
  p = p * r + 2.40222421e-1f;
  p = p * r + 6.93146978e-1f;
  p = p * r + 1.0f;
  return p * (F)(((typename W::I)shifted + 127) << 23);
}

constexpr float LOG2E = 1.44269504f;

template <class W>
static inline typename W::F tanh_(typename W::F x) {
  typedef typename W::I I;
  typename W::F e = exp2_<W>((typename W::F)((I)x & 0x7fffffff) * (-2.0f * LOG2E));
  return (typename W::F)((I)((1.0f - e) / (1.0f + e)) | ((I)x & (int32_t)0x80000000));
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
