// What all CPU kernels share: 16-wide vectors that the compiler maps to AVX-512, AVX2 or less, and loads that widen.
#pragma once
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum DType : int64_t { F32 = 0, BF16 = 1 };
typedef uint16_t bf16;  // the bit pattern

constexpr int L = 16;  // lanes
typedef float vf __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2)));

static inline vf splat(float x) { return vf{} + x; }
static inline vf load(const float* p) { return *(const vf*)p; }
static inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16); }
static inline void store(float* p, vf x) { *(vf*)p = x; }

// Round to nearest even; a NaN keeps its sign and stays a NaN.
static inline void store(bf16* p, vf x) {
  vu u = (vu)x;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vi is_nan = (x != x);
  rounded = ((vu)is_nan & ((u >> 16) | 0x40)) | (~(vu)is_nan & rounded);
  *(vh*)p = __builtin_convertvector(rounded, vh);
}
static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
  uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline void narrow(float* p, float x) { *p = x; }
static inline void narrow(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  *p = x != x ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));
static inline float sum(vf x) {
  vf8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  vf4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  b += __builtin_shufflevector(b, b, 2, 3, 0, 1);
  return b[0] + b[1];
}

// f(0), f(1) ... with constants for indices: an array that is only indexed so lives in registers.
template <int N, class F>
static inline __attribute__((always_inline)) void unroll(F f) {
  if constexpr (N > 0) {
    unroll<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
  }
}
#define EACH(i, N) unroll<N>([&](auto i) __attribute__((always_inline)) {
#define END });

// e^x for x <= 88, relative error about 1e-7; anything below -87 gives 0.
static inline vf exp_(vf x) {
  vi small = x < -87.0f;
  x = (vf)((vi)x & ~small);
  vf n = x * 1.44269504f;
  vf half = (vf)(((vi)n & (int32_t)0x80000000) | (vi)splat(0.5f));  // rounds away from zero at halves: good enough
  vi k = __builtin_convertvector(n + half, vi);
  vf kf = __builtin_convertvector(k, vf);
  vf r = x - kf * 0.693359375f + kf * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p = (vf)((vi)p + (k << 23));
  return (vf)((vi)p & ~small);
}

// How many threads a kernel uses when the calling thread calls it: each thread that drives a model says for itself.
inline int& threads() {
  static thread_local int count = omp_get_max_threads();
  return count;
}

// Enough work to be worth waking other threads, in bytes touched.
constexpr int64_t PARALLEL_BYTES = 1 << 16;
