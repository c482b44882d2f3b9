// y = (x_q - zero) . W_q * s_x * s_w + b, all 8 bits: the operands of VNNI's dot product, whose integers add up exactly.
// W_q lies in panels and is kept 128 too large, hence unsigned; sums of x_q and of W's rows take out both zero points.
//
// A step's few rows of x read W at the memory's speed. Many are taken eight at a time with three panels, 24 sums in
// registers, over a SEGMENT of the features that stays in the cache meanwhile; each pass fetches its share of the next.
#pragma once
#include "panels.h"

namespace int8 {

constexpr int64_t SEGMENT = 1024;  // features
constexpr int64_t BAND = 64;       // rows of x

static inline int64_t quads_of(int64_t depth) { return (depth + 15) / 16 * 4; }

struct Tokens {  // rows of x, quantized
  int8_t* q;
  float* scale;
  int32_t* start;  // -128 . the sum of a row
  int64_t stride;
};

struct Weight {
  const uint8_t* packed;
  const float* scale;  // by row of W
  const int32_t* sum;
  int64_t num_quads;
  int32_t zero;  // the x_q that stands for 0
  const uint8_t* panel(int64_t p) const { return packed + p * num_quads * 4 * PANEL; }
};

// sums [ROWS, COLUMNS, 16] += x . W over some features
template <int M, int N>
static __attribute__((noinline)) void tile(vi* sums, const int8_t* x, int64_t x_stride, const uint8_t* w, int64_t apart,
                                           int64_t num_quads, Fetch fetch) {
  vi acc[M * N];
  EACH(i, M * N) acc[i] = sums[i / N * COLUMNS + i % N]; END
  const int64_t three = 3 * x_stride;  // few addresses for many rows: base + 0, 1, 2, 3 strides
  for (const int8_t* y = x + 4 * x_stride; num_quads; num_quads--, x += 4, y += 4, w += 4 * PANEL) {
    vi some[N];
    EACH(n, N)
      some[n] = *(const vi*)(w + n * apart);
      __builtin_prefetch(fetch.from + n * apart, 0, 2);
    END
    fetch.from += fetch.apart;
    EACH(m, M)
      const Four a = four((m < 4 ? x : y) + (m % 4 == 3 ? three : m % 4 * x_stride));
      EACH(n, N) acc[m * N + n] = dot(acc[m * N + n], some[n], a); END
    END
  }
  EACH(i, M * N) sums[i / N * COLUMNS + i % N] = acc[i]; END
}

template <int N>
void panels(const Output& out, const Tokens& x, const Weight& w, int64_t p, int64_t each, int64_t begin, int64_t count) {
  const int64_t apart = w.panel(each) - w.panel(0), passes = (count + ROWS - 1) / ROWS;
  alignas(64) vi sums[BAND * COLUMNS];
  for (int64_t m = 0; m < count; m++)
    for (int n = 0; n < N; n++) sums[m * COLUMNS + n] = vi{} + x.start[begin + m];
  const uint8_t* at = w.panel(p);
  for (int64_t k = 0; k < w.num_quads; k += SEGMENT / 4) {
    const int64_t quads = w.num_quads - k < SEGMENT / 4 ? w.num_quads - k : SEGMENT / 4, bytes = quads * 4 * PANEL;
    by_rows(count, [&](int64_t m, auto rows) {
      const Fetch fetch = Fetch::of(at, bytes, m / ROWS, passes);
      tile<rows, N>(sums + m * COLUMNS, x.q + (begin + m) * x.stride + k * 4, x.stride, at, apart, quads, fetch);
    });
    at += bytes;
  }
  for (int n = 0; n < N; n++) {
    const int64_t to = (p + n * each) * PANEL, left = out.width - to;
    const vf scale = some(w.scale + to, left), bias = out.bias_at(to);
    vi zeros = vi{};
    if (w.zero)
      for (int64_t i = 0; i < PANEL && i < left; i++) zeros[i] = w.zero * w.sum[to + i];
    for (int64_t m = 0; m < count; m++) {
      const vf y = __builtin_convertvector(sums[m * COLUMNS + n] - zeros, vf) * (scale * x.scale[begin + m]);
      out.put_at(begin + m, to, out.bias ? y + bias : y);
    }
  }
}

static inline vf between(vf x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

// A row of x to 8 bits: x_q = round(x / s) + zero, with s = max|x| / 127 of the row, or the one `given`. Where a value is not
// finite, so is no output of the row.
template <typename T>
static void quantize(const Tokens& to, int64_t t, const T* x, const float* given, int64_t depth, int32_t zero) {
  int8_t* q = to.q + t * to.stride;
  vi top = vi{};
  for (int64_t k = 0; k < depth; k += L) top = larger(top, size_of(some(x + k, depth - k)));
  const int32_t highest = largest(top);
  if (highest >= 0x7f800000) {
    to.scale[t] = __builtin_nanf("");
    to.start[t] = 0;
    memset(q, 0, depth);
    return;
  }
  float s = given ? *given : float_of(highest) / 127.0f;
  if (s < 1.17549435e-38f) s = 1.17549435e-38f;
  const float inverse = 1.0f / s, low = -128.0f - zero, high = 127.0f - zero;
  vi sums = vi{};
  for (int64_t k = 0; k < depth; k += L) {
    vi whole = nearest(between(some(x + k, depth - k) * inverse, low, high)) + zero;
    if (depth - k < L)
      for (int64_t i = depth - k; i < L; i++) whole[i] = 0;
    sums += whole;
    put_bytes(q + k, whole);
  }
  to.scale[t] = s;
  to.start[t] = -128 * total(sums);
}

static inline void quantize(const Tokens& to, int64_t t, const void* x, int64_t stride, int64_t dtype, const float* given,
                            int64_t depth, int32_t zero) {
  if (dtype == BF16)
    quantize(to, t, (const bf16*)x + t * stride, given, depth, zero);
  else
    quantize(to, t, (const float*)x + t * stride, given, depth, zero);
}

// Where `count` quantized rows, and those that tiles may reach beyond them, lie in `memory`.
static inline int64_t bytes_of(int64_t count, int64_t stride) { return reached(count) * stride + 8 * count; }
static inline Tokens tokens_in(uint8_t* memory, int64_t count, int64_t stride) {
  uint8_t* rest = memory + reached(count) * stride;
  return {(int8_t*)memory, (float*)rest, (int32_t*)(rest + 4 * count), stride};
}

// Made in int8_linear/cpu.cpp.
extern template void panels<1>(const Output&, const Tokens&, const Weight&, int64_t, int64_t, int64_t, int64_t);
extern template void panels<COLUMNS>(const Output&, const Tokens&, const Weight&, int64_t, int64_t, int64_t, int64_t);

}  // namespace int8
