// y = x . W^T with unsigned 4- or 8-bit q and scales by group, activations as signed 8-bit with a scale a block of them:
// the operands of VNNI's dot product. Sixteen rows of W lie side by side, four features of each in a lane, so that sums
// need no crossing of lanes and a group's scales are one vector:
//
//     panel of 16 rows | features in steps of 16 | 4 quads | 16 rows | 4 features      8 bits: a byte each
//     4 bits: quads 0 and 1 share 64 bytes (low, high half), quads 2 and 3 the next 64
//
// Blocks never cross groups. Integers add up exactly and blocks are summed in order: a row is the same in every batch.
#include "common.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

constexpr int64_t PANEL = 16;   // rows of W
constexpr int64_t STEP = 16;    // features
constexpr int64_t CHUNK = 4;    // panels that a thread takes at once
constexpr int64_t BAND = 64;    // rows of x that stay in the cache with them
typedef uint16_t half;          // the bit pattern

struct Shape {
  int64_t count, width, depth, group_size, num_groups, block, zero;
  int64_t group_end(int64_t g) const { return (g + 1) * group_size < depth ? (g + 1) * group_size : depth; }
  int64_t blocks_of(int64_t g) const { return (group_end(g) - g * group_size + block - 1) / block; }
  int64_t num_blocks() const { return (num_groups - 1) * blocks_of(0) + blocks_of(num_groups - 1); }
};

struct Activations {  // by row of x, blocks padded with zeros
  int8_t* q;
  float* scale;    // by block
  int32_t* start;  // by block: -zero . sum of q
  float* sum;      // by group, of the quantized x: what the offsets multiply
};

struct Weights {
  const uint8_t* packed;
  const half *scale, *offset;  // [panel, group, 16]; no offset: null
  float factor;                // of all scales and offsets
};

// acc[n] += the four features of row n in w . the four of x
#if defined(__AVX512VNNI__)
static inline vi dot(vi acc, vi w, const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(four));
}
#elif defined(__AVX2__)
static inline vi dot(vi acc, vi w, const int8_t* x) {
  const __m256i even = _mm256_set1_epi32((uint16_t)x[0] | (uint32_t)x[2] << 16), low = _mm256_set1_epi32(0x00ff00ff);
  const __m256i odd = _mm256_set1_epi32((uint16_t)x[1] | (uint32_t)x[3] << 16);
  __m256i half[2];
  memcpy(half, &w, 64);
  for (__m256i& some : half)
    some = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(some, low), even),
                            _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(some, 8), low), odd));
  vi sums;
  memcpy(&sums, half, 64);
  return acc + sums;
}
#else
static inline vi dot(vi acc, vi w, const int8_t* x) {
  const vu u = (vu)w;
  return acc + (vi)(u & 255) * x[0] + (vi)(u >> 8 & 255) * x[1] + (vi)(u >> 16 & 255) * x[2] + (vi)(u >> 24) * x[3];
}
#endif

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

// Four quads of sixteen rows.
template <int BITS>
static inline void take(vi (&w)[4], const uint8_t* p) {
  EACH(i, BITS / 2)
    vi some = *(const vi*)(p + i * 64);
    if constexpr (BITS == 8)
      w[i] = some;
    else
      w[2 * i] = some & 0x0f0f0f0f, w[2 * i + 1] = (vi)((vu)some >> 4) & 0x0f0f0f0f;
  END
}

template <int M, int BITS>
static __attribute__((noinline)) void tile(vf (&y)[M], Activations x, Weights w, const Shape& s, int64_t num_blocks) {
  constexpr int CHAINS = M < 4 ? 4 / M : 1;  // sums of their own, where there are too few to hide a dot's latency
  const int64_t x_stride = num_blocks * s.block;
  const int64_t ahead = x_stride * PANEL * BITS / 8;  // the next panel, into the second level
  EACH(m, M) y[m] = vf{}; END
  for (int64_t g = 0, b = 0; g < s.num_groups; g++) {
    vf sum[M];
    EACH(m, M) sum[m] = vf{}; END
    for (const int64_t end = b + s.blocks_of(g); b < end; b++) {
      vi q[M][CHAINS];
      EACH(m, M)
        EACH(c, CHAINS) q[m][c] = vi{} + (c ? 0 : x.start[m * num_blocks + b]); END
      END
      for (const int8_t* stop = x.q + s.block; x.q < stop; x.q += STEP, w.packed += PANEL * STEP * BITS / 8) {
        vi some[4];
        EACH(i, BITS / 2) __builtin_prefetch(w.packed + ahead + i * 64, 0, 2); END
        take<BITS>(some, w.packed);
        EACH(j, 4)
          EACH(m, M) q[m][j % CHAINS] = dot(q[m][j % CHAINS], some[j], x.q + m * x_stride + 4 * j); END
        END
      }
      EACH(m, M)
        EACH(c, CHAINS - 1) q[m][0] += q[m][c + 1]; END
        sum[m] += __builtin_convertvector(q[m][0], vf) * x.scale[m * num_blocks + b];
      END
    }
    const vf scale = load_half(w.scale + g * PANEL);
    EACH(m, M) y[m] += sum[m] * scale; END
    if (w.offset) {
      const vf offset = load_half(w.offset + g * PANEL);
      EACH(m, M) y[m] += offset * x.sum[m * s.num_groups + g]; END
    }
  }
}

template <typename T>
static void save(T* out, vf y, const float* bias, int64_t count) {
  if (count == PANEL)
    store(out, bias ? y + load(bias) : y);
  else
    for (int64_t n = 0; n < count; n++) narrow(out + n, bias ? y[n] + bias[n] : y[n]);
}

struct Output {  // rows of `width`, of float32 or bfloat16
  void* to;
  const float* bias;
  int64_t width, dtype;
  void put(int64_t m, int64_t n, vf y) const {
    const int64_t count = n + PANEL < width ? PANEL : width - n;
    const float* some = bias ? bias + n : bias;
    if (dtype == BF16)
      save((bf16*)to + m * width + n, y, some, count);
    else
      save((float*)to + m * width + n, y, some, count);
  }
};

template <int M, int BITS>
static void rows(const Output& out, Activations x, Weights w, const Shape& s, int64_t num_blocks, int64_t m, int64_t n) {
  vf y[M];
  x.q += m * num_blocks * s.block, x.scale += m * num_blocks, x.start += m * num_blocks, x.sum += m * s.num_groups;
  tile<M, BITS>(y, x, w, s, num_blocks);
  for (int i = 0; i < M; i++) out.put(m + i, n, y[i] * w.factor);
}

template <int BITS>
static void panel(const Output& out, Activations x, Weights w, const Shape& s, int64_t num_blocks, int64_t m, int64_t end,
                  int64_t n) {
  for (; m + 8 <= end; m += 8) rows<8, BITS>(out, x, w, s, num_blocks, m, n);
  if (m + 4 <= end) rows<4, BITS>(out, x, w, s, num_blocks, m, n), m += 4;
  if (m + 2 <= end) rows<2, BITS>(out, x, w, s, num_blocks, m, n), m += 2;
  if (m < end) rows<1, BITS>(out, x, w, s, num_blocks, m, n);
}

template <int BITS>
static void multiply(const Output& out, Activations x, Weights w, const Shape& s) {
  const int64_t num_blocks = s.num_blocks(), num_panels = (s.width + PANEL - 1) / PANEL;
  const int64_t panel_bytes = num_blocks * s.block * PANEL * BITS / 8, panel_scales = s.num_groups * PANEL;
#pragma omp parallel for num_threads(threads()) schedule(dynamic, 1)
  for (int64_t chunk = 0; chunk < (num_panels + CHUNK - 1) / CHUNK; chunk++) {
    const int64_t last = (chunk + 1) * CHUNK < num_panels ? (chunk + 1) * CHUNK : num_panels;
    for (int64_t m = 0; m < s.count; m += BAND) {
      const int64_t end = m + BAND < s.count ? m + BAND : s.count;
      for (int64_t p = chunk * CHUNK; p < last; p++) {
        Weights some{w.packed + p * panel_bytes, w.scale + p * panel_scales, w.offset ? w.offset + p * panel_scales : nullptr,
                     w.factor};
        panel<BITS>(out, x, some, s, num_blocks, m, end, p * PANEL);
      }
    }
  }
}

// A block of x, up to 64 values already wide and padded with zeros, to 8 bits: q = round(x / scale), scale = max|x| / 127.
// Returns the sum of q. Where a value is not finite the scale is NaN, and so is every output of the row.
static inline int32_t quantize_block(int8_t* q, float* scale, const float* x, int64_t block) {
  vi top = vi{};  // the bits of |x| are ordered as |x| is, and a NaN is above all
  for (int64_t k = 0; k < block; k += L) {
    vi bits = (vi)load(x + k) & 0x7fffffff, more = bits > top;
    top = (bits & more) | (top & ~more);
  }
  int32_t highest = 0;
  for (int i = 0; i < L; i++) highest = top[i] > highest ? top[i] : highest;
  if (highest >= 0x7f800000) {
    memset(q, 0, block);
    *scale = __builtin_nanf("");
    return 0;
  }
  float high;
  memcpy(&high, &highest, 4);
  const float s = high < 1.5e-36f ? 1.17549435e-38f : high / 127.0f, inverse = 1.0f / s;
  const vf magic = splat(12582912.0f);  // adding it rounds to the nearest integer, halves to even
  vi sum = vi{};
  for (int64_t k = 0; k < block; k += L) {
    vi some = (vi)(load(x + k) * inverse + magic) - (vi)magic;
    sum += some;
    typedef int8_t vb __attribute__((vector_size(16), aligned(1)));
    *(vb*)(q + k) = __builtin_convertvector(some, vb);
  }
  *scale = s;
  int32_t total = 0;
  for (int i = 0; i < L; i++) total += sum[i];
  return total;
}

template <typename T>
static inline void gather(float* wide, const T* row, const int32_t* columns, int64_t begin, int64_t count, int64_t block) {
  int64_t k = 0;
  if (columns)
    for (; k < count; k++) wide[k] = widen(row[columns[begin + k]]);
  else
    for (; k + L <= count; k += L) store(wide + k, load(row + begin + k));
  for (; k < count; k++) wide[k] = widen(row[begin + k]);
  for (; k < block; k++) wide[k] = 0;
}

template <typename T>
static void quantize(Activations to, const T* x, const int32_t* columns, int64_t stride, const Shape& s) {
  const int64_t num_blocks = s.num_blocks();
#pragma omp parallel for num_threads(threads()) if (s.count * s.depth * (int64_t)sizeof(T) > PARALLEL_BYTES)
  for (int64_t t = 0; t < s.count; t++) {
    for (int64_t g = 0, b = t * num_blocks; g < s.num_groups; g++) {
      float of_group = 0;
      for (int64_t k = g * s.group_size, end = s.group_end(g); k < end; k += s.block, b++) {
        alignas(64) float wide[64];
        gather(wide, x + t * stride, columns, k, end - k < s.block ? end - k : s.block, s.block);
        const int32_t sum = quantize_block(to.q + b * s.block, to.scale + b, wide, s.block);
        to.start[b] = -(int32_t)s.zero * sum;
        of_group += to.scale[b] * sum;
      }
      to.sum[t * s.num_groups + g] = of_group;
    }
  }
}

static inline int64_t aligned(int64_t bytes) { return (bytes + 63) & -64; }

// `block` is 16, 32 or 64; `scratch` holds a row of x after the other: blocks . (block + 8) + 4 . groups bytes, and 192.
EXPORT void llmd_grouped_linear(void* out, const void* x, const int32_t* columns, const uint8_t* packed, const half* scale,
                                const half* offset, const float* bias, uint8_t* scratch, float factor, int64_t count,
                                int64_t width, int64_t depth, int64_t stride, int64_t bits, int64_t group_size,
                                int64_t block, int64_t zero, int64_t dtype) {
  const Shape s{count, width, depth, group_size, (depth + group_size - 1) / group_size, block, offset ? 0 : zero};
  const int64_t blocks = count * s.num_blocks();
  Activations some{(int8_t*)scratch};
  some.scale = (float*)(scratch += aligned(blocks * block));
  some.start = (int32_t*)(scratch += aligned(blocks * 4));
  some.sum = (float*)(scratch + aligned(blocks * 4));
  if (dtype == BF16)
    quantize(some, (const bf16*)x, columns, stride, s);
  else
    quantize(some, (const float*)x, columns, stride, s);
  const Weights w{packed, scale, offset, factor};
  const Output to{out, bias, width, dtype};
  if (bits == 4)
    multiply<4>(to, some, w, s);
  else
    multiply<8>(to, some, w, s);
}
