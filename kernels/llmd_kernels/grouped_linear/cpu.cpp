// The products of grouped.h, shared out among the threads.
#include "grouped.h"

using namespace grouped;

template void grouped::panels<1, 4>(const Output&, const Activations&, const Weights&, const Shape&,
                                    int64_t, int64_t, int64_t, int64_t);
template void grouped::panels<1, 8>(const Output&, const Activations&, const Weights&, const Shape&,
                                    int64_t, int64_t, int64_t, int64_t);
template void grouped::panels<COLUMNS, 4>(const Output&, const Activations&, const Weights&, const Shape&,
                                          int64_t, int64_t, int64_t, int64_t);
template void grouped::panels<COLUMNS, 8>(const Output&, const Activations&, const Weights&, const Shape&,
                                          int64_t, int64_t, int64_t, int64_t);

template <int BITS>
static void multiply(const Output& out, const Activations& x, const Weights& w, const Shape& s) {
  const Share share(s.width, s.count, BAND);
#pragma omp for schedule(dynamic, share.chunk)
  for (int64_t i = 0; i < share.each * share.bands; i++) {
    const int64_t begin = i % share.bands * BAND;
    share.at(i / share.bands, [&](int64_t p, auto columns) {
      panels<columns, BITS>(out, x, w, s, p, share.each, begin, share.rows_at(begin, s.count));
    });
  }
}

// `block` is 16, 32 or 64. `scratch`: (rows, to the next 8) . ((blocks . block, to the next odd 64) + 8 . blocks + 4 . groups)
EXPORT void llmd_grouped_linear(void* out, const void* x, const int32_t* columns, const uint8_t* packed, const half* scale,
                                const half* offset, const void* bias, uint8_t* scratch, float factor, int64_t count,
                                int64_t width, int64_t depth, int64_t stride, int64_t bits, int64_t group_size,
                                int64_t block, int64_t zero, int64_t dtype, int64_t bias_dtype) {
  const Shape s{count, width, depth, group_size, (depth + group_size - 1) / group_size, block, offset ? 0 : zero};
  const Weights w{packed, scale, offset, factor};
  const Output to{out, bias, width, dtype, bias_dtype};
  team(s.width * s.depth, [&] {
    alignas(64) uint8_t own[OWN];
    const bool is_small = bytes_of(s) <= OWN;
    const Activations some = activations_in(is_small ? own : scratch, s);
    if (is_small)
      for (int64_t t = 0; t < count; t++) quantize(some, t, x, stride, dtype, columns, s);
    else
#pragma omp for
      for (int64_t t = 0; t < count; t++) quantize(some, t, x, stride, dtype, columns, s);
    if (bits == 4)
      multiply<4>(to, some, w, s);
    else
      multiply<8>(to, some, w, s);
  });
}
REPLAYABLE(llmd_grouped_linear)
