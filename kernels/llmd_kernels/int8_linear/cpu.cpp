// The products of int8.h, shared out among the threads, and rows of W looked up.
#include "int8.h"

using namespace int8;

template void int8::panels<1>(const Output&, const Tokens&, const Weight&, int64_t, int64_t, int64_t, int64_t);
template void int8::panels<COLUMNS>(const Output&, const Tokens&, const Weight&, int64_t, int64_t, int64_t, int64_t);

static void multiply(const Output& out, const Tokens& x, const Weight& w, int64_t count) {
  const Share share(out.width, count, BAND);
#pragma omp for schedule(dynamic, share.chunk)
  for (int64_t i = 0; i < share.each * share.bands; i++) {
    const int64_t begin = i % share.bands * BAND;
    share.at(i / share.bands, [&](int64_t p, auto columns) {
      panels<columns>(out, x, w, p, share.each, begin, share.rows_at(begin, count));
    });
  }
}

// `scratch`: (rows, to the next 8) . (features, to the next odd 64) + 8 . rows bytes
EXPORT void llmd_int8_linear(void* out, const void* x, const float* given, const uint8_t* packed, const float* scale,
                             const int32_t* sum, const void* bias, uint8_t* scratch, int64_t count, int64_t width,
                             int64_t depth, int64_t x_stride, int64_t zero, int64_t dtype, int64_t out_dtype,
                             int64_t bias_dtype) {
  const Output to{out, bias, width, out_dtype, bias_dtype};
  const Weight w{packed, scale, sum, quads_of(depth), (int32_t)zero};
  const int64_t stride = spread(depth);
  team(width * depth, [&] {
    alignas(64) uint8_t own[OWN];
    const bool is_small = bytes_of(count, stride) <= OWN;
    const Tokens tokens = tokens_in(is_small ? own : scratch, count, stride);
    if (is_small)
      for (int64_t t = 0; t < count; t++) quantize(tokens, t, x, x_stride, dtype, given, depth, (int32_t)zero);
    else
#pragma omp for
      for (int64_t t = 0; t < count; t++) quantize(tokens, t, x, x_stride, dtype, given, depth, (int32_t)zero);
    multiply(to, tokens, w, count);
  });
}
REPLAYABLE(llmd_int8_linear)

// out[i] = W[ids[i]] * its scale; an id outside stands for the nearest one inside.
template <typename T>
static void look_up(T* out, const uint8_t* packed, float scale, int64_t id, int64_t depth) {
  const uint8_t* row = packed + id / PANEL * quads_of(depth) * 4 * PANEL + id % PANEL * 4;
  for (int64_t k = 0; k < depth; k += 4, row += 4 * PANEL)
    for (int64_t i = 0; i < 4 && k + i < depth; i++) narrow(out + k + i, (row[i] - 128) * scale);
}

EXPORT void llmd_int8_rows(void* out, const int64_t* ids, const uint8_t* packed, const float* scale, int64_t count,
                           int64_t num_ids, int64_t depth, int64_t dtype) {
  team(count * depth * 16, [=] {  // a line of memory for four values
#pragma omp for
    for (int64_t i = 0; i < count; i++) {
      const int64_t id = ids[i] < 0 ? 0 : ids[i] < num_ids ? ids[i] : num_ids - 1;
      if (dtype == BF16)
        look_up((bf16*)out + i * depth, packed, scale[id], id, depth);
      else
        look_up((float*)out + i * depth, packed, scale[id], id, depth);
    }
  });
}
REPLAYABLE(llmd_int8_rows)
