// The activations of gated MLPs: silu of Llama's kind, gelu of Gemma's, exact or by tanh.
#pragma once
#include "lines.h"

enum Kind : int64_t { SILU = 0, GELU = 1, GELU_TANH = 2 };

// 1 / x for x of [1, 2], relative error 1e-7.
static inline vf inverse(vf x) {
#ifdef __AVX512F__
  vf near = (vf)_mm512_rcp14_ps((__m512)x);
  return near * (2.0f - x * near);
#else
  return 1.0f / x;
#endif
}

// x / (1 + e^-y), never by an e^ of what is large.
static inline vf gated(vf x, vf y) {
  vf e = exp2_<Sixteen>((vf)((vi)y | (int32_t)0x80000000) * LOG2E);  // e^-|y|
  return x * (y >= 0.0f ? splat(1.0f) : e) * inverse(1.0f + e);
}

// The share of the normal distribution beyond |x|: a polynomial in t times e^(-x^2/2), absolute error 1e-7.
// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
static inline vf beyond(vf x) {
  vf size = (vf)((vi)x & 0x7fffffff) * 0.707106781f, t = 1.0f / (1.0f + 0.3275911f * size);
  vf p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  return 0.5f * p * exp2_<Sixteen>(size * size * -LOG2E);
}

template <int KIND>
static inline vf act(vf x) {
  if constexpr (KIND == SILU) return gated(x, x);
  if constexpr (KIND == GELU_TANH) return gated(x, 1.59576912f * (x + 0.044715f * x * x * x));
  vf away = beyond(x);
  return x * (x >= 0.0f ? 1.0f - away : away);
}

// y [dim] = act(x [:dim]) * x [dim:] from `begin` to `end`; y may be x.
template <int KIND, typename T>
static inline void gate(T* y, const T* x, int64_t dim, int64_t begin, int64_t end) {
  for (int64_t d = begin; d < end; d += L)
    store_some(y + d, act<KIND>(load_some(x + d, end - d)) * load_some(x + dim + d, end - d), end - d);
}
