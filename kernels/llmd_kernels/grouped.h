// y = x . W^T with unsigned 4- or 8-bit q and scales by group, activations as signed 8-bit with a scale a block of them:
// the operands of VNNI's dot product, and a group's scales are one vector. W lies in panels:
//
//     8 bits: a quad of features takes 64 bytes     4 bits: two quads share them, in their low and their high halves
//
// Blocks never cross groups. Integers add up exactly and blocks are summed in order: a row is the same in every batch.
#pragma once
#include "panels.h"

namespace grouped {

constexpr int64_t BAND = 64;  // rows of x that stay in the cache with some panels
typedef uint16_t half;        // the bit pattern

struct Shape {
  int64_t count, width, depth, group_size, num_groups, block, zero;
  int64_t group_end(int64_t g) const { return (g + 1) * group_size < depth ? (g + 1) * group_size : depth; }
  int64_t blocks_of(int64_t g) const { return (group_end(g) - g * group_size + block - 1) / block; }
  int64_t num_blocks() const { return (num_groups - 1) * blocks_of(0) + blocks_of(num_groups - 1); }
};

struct Activations {  // rows of x, blocks padded with zeros
  int8_t* q;
  float* scale;    // by block
  int32_t* start;  // by block: -zero . sum of q
  float* sum;      // by group, of the quantized x: what the offsets multiply
  int64_t stride, num_blocks, num_groups;
  Activations row(int64_t m) const {
    return {q + m * stride, scale + m * num_blocks, start + m * num_blocks, sum + m * num_groups,
            stride, num_blocks, num_groups};
  }
};

struct Weights {
  const uint8_t* packed;
  const half *scale, *offset;  // [panel, group, 16]; no offset: null
  float factor;                // of all scales and offsets
};

static inline vf load_half(const half* p) {
#ifdef __AVX512F__
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  vu u = __builtin_convertvector(*(const vh*)p, vu);
  vu magnitude = (u & 0x7fff) << 13, special = (vu)((u & 0x7c00) == 0x7c00) & (255u << 23);
  vf x = (vf)magnitude * 5.192296858534828e33f;  // 2^112: the exponents' biases apart; subnormal halves come out right
  return (vf)((vu)x | special | (u & 0x8000) << 16);
#endif
}

// The quads that share 64 bytes.
template <int BITS, int I>
static inline vi quad(const uint8_t* p) {
  if constexpr (BITS == 8)
    return *(const vi*)p;
  else if constexpr (I == 1)
    return (vi)(*(const vu*)p >> 4) & 0x0f0f0f0f;
  else
    return *(const vi*)p & 0x0f0f0f0f;
}

// y [ROWS, COLUMNS] of M rows of x with N panels of W, `apart` bytes from one to the next, and their scales so far.
template <int M, int N, int BITS>
static __attribute__((noinline)) void tile(vf* y, Activations x, Weights w, int64_t apart, int64_t scales_apart, const Shape& s,
                                           Fetch fetch) {
  constexpr int QUADS = 8 / BITS;
  const int64_t whole = s.blocks_of(0), last = s.blocks_of(s.num_groups - 1);
  const int64_t three = 3 * x.stride;  // few addresses for many rows: base + 0, 1, 2, 3 strides
  EACH(i, M * N) y[i / N * COLUMNS + i % N] = vf{}; END
  for (int64_t g = 0; g < s.num_groups; g++, w.scale += PANEL) {
    vf scale[N];
    EACH(n, N)
      scale[n] = load_half(w.scale + n * scales_apart);
      __builtin_prefetch(w.scale + n * scales_apart + AHEAD / 8, 0, 2);
    END
    for (int64_t left = g + 1 < s.num_groups ? whole : last; left; left--, x.scale++, x.start++) {
      vi acc[M * N];
      EACH(m, M)
        const vi start = vi{} + x.start[m * x.num_blocks];
        EACH(n, N) acc[m * N + n] = start; END
      END
      for (const int8_t* stop = x.q + s.block; x.q < stop; x.q += 4 * QUADS, w.packed += 64, fetch.from += fetch.apart) {
        EACH(n, N) __builtin_prefetch(fetch.from + n * apart, 0, 2); END
        const int8_t* high = x.q + 4 * x.stride;
        EACH(i, QUADS)
          vi some[N];
          EACH(n, N) some[n] = quad<BITS, i>(w.packed + n * apart); END
          EACH(m, M)
            const Four a = four((m < 4 ? x.q : high) + (m % 4 == 3 ? three : m % 4 * x.stride) + 4 * i);
            EACH(n, N) acc[m * N + n] = dot(acc[m * N + n], some[n], a); END
          END
        END
      }
      EACH(m, M)
        const vf of_block = splat(x.scale[m * x.num_blocks]);
        EACH(n, N) y[m * COLUMNS + n] += __builtin_convertvector(acc[m * N + n], vf) * of_block * scale[n]; END
      END
    }
    if (w.offset) {
      EACH(n, N)
        const vf offset = load_half(w.offset + n * scales_apart);
        EACH(m, M) y[m * COLUMNS + n] += offset * x.sum[m * x.num_groups + g]; END
      END
      w.offset += PANEL;
    }
  }
}

template <int N, int BITS>
void panels(const Output& out, const Activations& x, const Weights& w, const Shape& s, int64_t p, int64_t each,
                   int64_t begin, int64_t count) {
  const int64_t bytes = x.num_blocks * s.block * PANEL * BITS / 8, scales = s.num_groups * PANEL;
  const Weights here{w.packed + p * bytes, w.scale + p * scales, w.offset ? w.offset + p * scales : nullptr, w.factor};
  by_rows(count, [&](int64_t m, auto rows) {
    alignas(64) vf y[ROWS * COLUMNS];
    const Fetch fetch = Fetch::of(here.packed, bytes, m / ROWS, (count + ROWS - 1) / ROWS);
    tile<rows, N, BITS>(y, x.row(begin + m), here, each * bytes, each * scales, s, fetch);
    for (int n = 0; n < N; n++) {
      const int64_t to = (p + n * each) * PANEL;
      const vf bias = out.bias_at(to);
      for (int i = 0; i < rows && m + i < count; i++) {
        const vf whole = y[i * COLUMNS + n] * w.factor;
        out.put_at(begin + m + i, to, out.bias ? whole + bias : whole);
      }
    }
  });
}

// A block of x, up to 64 values already wide and padded with zeros, to 8 bits: q = round(x / scale), scale = max|x| / 127.
// Returns the sum of q. Where a value is not finite the scale is NaN, and so is every output of the row.
static inline int32_t quantize_block(int8_t* q, float* scale, const vf* x, int64_t block) {
  vi top = vi{}, sum = vi{};
  for (int64_t i = 0; i < block / L; i++) top = larger(top, size_of(x[i]));
  const int32_t highest = largest(top);
  if (highest >= 0x7f800000) {
    memset(q, 0, block);
    *scale = __builtin_nanf("");
    return 0;
  }
  const float high = float_of(highest), s = high < 1.5e-36f ? 1.17549435e-38f : high / 127.0f, inverse = 1.0f / s;
  for (int64_t i = 0; i < block / L; i++) {
    const vi whole = nearest(x[i] * inverse);
    sum += whole;
    put_bytes(q + i * L, whole);
  }
  *scale = s;
  return total(sum);
}

template <typename T>
static inline void gather(vf* wide, const T* row, const int32_t* columns, int64_t begin, int64_t count, int64_t block) {
  for (int64_t k = 0; k < block; k += L) {
    if (!columns) {
      wide[k / L] = k < count ? some(row + begin + k, count - k) : vf{};
      continue;
    }
    vf picked = vf{};
    for (int64_t i = 0; i < L && k + i < count; i++) picked[i] = widen(row[columns[begin + k + i]]);
    wide[k / L] = picked;
  }
}

template <typename T>
static void quantize(Activations to, const T* x, const int32_t* columns, const Shape& s) {
  for (int64_t g = 0; g < s.num_groups; g++) {
    float of_group = 0;
    for (int64_t k = g * s.group_size, end = s.group_end(g); k < end; k += s.block, to.q += s.block) {
      vf wide[64 / L];
      gather(wide, x, columns, k, end - k < s.block ? end - k : s.block, s.block);
      const int32_t sum = quantize_block(to.q, to.scale, wide, s.block);
      *to.start++ = -(int32_t)s.zero * sum;
      of_group += *to.scale++ * sum;
    }
    *to.sum++ = of_group;
  }
}

static inline void quantize(const Activations& to, int64_t t, const void* x, int64_t stride, int64_t dtype,
                            const int32_t* columns, const Shape& s) {
  if (dtype == BF16)
    quantize(to.row(t), (const bf16*)x + t * stride, columns, s);
  else
    quantize(to.row(t), (const float*)x + t * stride, columns, s);
}

// Where `count` quantized rows, and those that tiles may reach beyond them, lie in `memory`, and how many bytes they take.
static inline Activations activations_in(uint8_t* memory, const Shape& s) {
  const int64_t rows = reached(s.count), blocks = s.num_blocks(), stride = spread(blocks * s.block);
  uint8_t *scale = memory + rows * stride, *start = scale + rows * blocks * 4, *sum = start + rows * blocks * 4;
  return {(int8_t*)memory, (float*)scale, (int32_t*)start, (float*)sum, stride, blocks, s.num_groups};
}
static inline int64_t bytes_of(const Shape& s) {
  return reached(s.count) * (spread(s.num_blocks() * s.block) + s.num_blocks() * 8 + s.num_groups * 4);
}

// Made in grouped_linear/cpu.cpp.
extern template void panels<1, 4>(const Output&, const Activations&, const Weights&, const Shape&,
                                  int64_t, int64_t, int64_t, int64_t);
extern template void panels<1, 8>(const Output&, const Activations&, const Weights&, const Shape&,
                                  int64_t, int64_t, int64_t, int64_t);
extern template void panels<COLUMNS, 4>(const Output&, const Activations&, const Weights&, const Shape&,
                                        int64_t, int64_t, int64_t, int64_t);
extern template void panels<COLUMNS, 8>(const Output&, const Activations&, const Weights&, const Shape&,
                                        int64_t, int64_t, int64_t, int64_t);

}  // namespace grouped
