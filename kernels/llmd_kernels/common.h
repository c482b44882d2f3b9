// What all CPU kernels share: 16-wide vectors that the compiler maps to AVX-512, AVX2 or less, and loads that widen.
#pragma once
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

enum DType : int64_t { F32 = 0, BF16 = 1, I8 = 2, E4M3 = 3 };  // the last two with scales of their own
typedef uint16_t bf16;  // the bit pattern
struct e4m3 { uint8_t bits; };

constexpr int L = 16;  // lanes
typedef float vf __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2)));
typedef int8_t vb __attribute__((vector_size(16), aligned(1)));

static inline vf splat(float x) { return vf{} + x; }
static inline vf load(const float* p) { return *(const vf*)p; }

// Sixteen small integers to words and back: one instruction each, of which the compiler makes dozens by itself.
#ifdef __AVX512F__
static inline vu words(const uint16_t* p) { return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
static inline vi words(const int8_t* p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline void put_bytes(void* p, vi x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x)); }
#else
static inline vu words(const uint16_t* p) { return __builtin_convertvector(*(const vh*)p, vu); }
static inline vi words(const int8_t* p) { return __builtin_convertvector(*(const vb*)p, vi); }
static inline void put_bytes(void* p, vi x) { *(vb*)p = __builtin_convertvector(x, vb); }
#endif
static inline vf load(const bf16* p) { return (vf)(words(p) << 16); }
static inline void store(float* p, vf x) { *(vf*)p = x; }

// Round to nearest even; a NaN keeps its sign and stays a NaN. The instruction takes what is below 2^-126 for zero.
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
static inline void store(bf16* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
static inline void store(bf16* p, vf x) {
  vu u = (vu)x;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vi is_nan = (x != x);
  rounded = ((vu)is_nan & ((u >> 16) | 0x40)) | (~(vu)is_nan & rounded);
  *(vh*)p = __builtin_convertvector(rounded, vh);
}
#endif
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
static inline vf load(const int8_t* p) { return __builtin_convertvector(words(p), vf); }
static inline float widen(int8_t x) { return x; }

// To the nearest whole number, even at halves; |x| < 2^22: a number that large has no room for a fraction.
static inline vi nearest(vf x) { return (vi)(x + 12582912.0f) - 0x4b400000; }
static inline void store(int8_t* p, vf x) { put_bytes(p, nearest(x)); }

// Sign, four bits of exponent (bias 7), three of mantissa; never holds a NaN here. The fields go to their places in a
// float, whose bias is larger by 120: the product puts that right, below 2^-6 too.
static inline vf load(const e4m3* p) {
  vi x = words((const int8_t*)p) << 20;  // copies of the sign in the bits between
  return (vf)(x & (int32_t)0x87f00000) * 0x1p120f;
}
static inline float widen(e4m3 x) {
  uint32_t u = (uint32_t)(x.bits & 0x7f) << 20 | (uint32_t)(x.bits & 0x80) << 24;
  float f;
  memcpy(&f, &u, 4);
  return f * 0x1p120f;
}
static inline void store(e4m3* p, vf x) {  // |x| <= 448, to the nearest, even at halves
  vi size = (vi)x & 0x7fffffff, is_small = (vf)size < 0.015625f;
  vi normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3), tiny = nearest((vf)size * 512.0f);
  vi code = (is_small & tiny) | (~is_small & normal) | (((vi)x >> 24) & 0x80);
  put_bytes(p, code);
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

// An op is a function that a whole team runs: it shares its work out with `#pragma omp for`, whose end is a barrier, and
// what it declares outside belongs to each thread. Called alone it gets a team of its own, or one thread where `bytes` are
// too few to wake others; within a replay (replay/cpu.cpp) the team that is at work already runs one op after another.
template <class Body>
static inline void team(int64_t bytes, Body body) {
  if (omp_get_level() > 0) {
    body();
  } else if (bytes <= PARALLEL_BYTES || threads() == 1) {
    body();
  } else {
#pragma omp parallel num_threads(threads())
    body();
  }
}

// A recorded argument, and the call of an op with recorded arguments.
union Argument {
  void* pointer;
  int64_t integer;
  double number;
};

template <class T>
static inline T as(const Argument& a) {
  if constexpr (std::is_pointer_v<T>)
    return (T)a.pointer;
  else if constexpr (std::is_floating_point_v<T>)
    return (T)a.number;
  else
    return (T)a.integer;
}

template <class... T, size_t... I>
static inline void call(void (*op)(T...), const Argument* arguments, std::index_sequence<I...>) {
  op(as<T>(arguments[I])...);
}
template <class... T>
static inline void call(void (*op)(T...), const Argument* arguments) {
  call(op, arguments, std::index_sequence_for<T...>{});
}

// Every op that a replay may call says so after its definition.
#define REPLAYABLE(op) \
  EXPORT void op##_replay(const Argument* arguments) { call(op, arguments); }
