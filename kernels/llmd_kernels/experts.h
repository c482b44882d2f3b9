// How rows of x are multiplied by experts' weights, by their format: `take` a place's row as the product reads it, `share` the
// columns of each expert among threads, `multiply` one unit of them. `room`, `bytes` of it, holds the rows that were taken.
#pragma once
#include "dense.h"
#include "fp8.h"
#include "grouped.h"
#include "int8.h"

namespace experts {

enum Format : int64_t { DENSE = 0, INT8 = 1, GROUPED = 2, FP8 = 3 };

constexpr int64_t SPARE = 8;  // rows that tiles may reach beyond the last expert's

// One linear of all experts: facts, then for each fact that is an expert's own a column of them.
struct Table {
  int64_t format, count, width, depth, bits, group_size, block, zero;
  enum Column { WEIGHT, SCALE, OFFSET, ORDER, FACTOR };
  template <typename P>
  P* of(Column column, int64_t expert) const { return (P*)((void* const*)(this + 1))[column * count + expert]; }
  float factor(int64_t expert) const { return (float)((const double*)(this + 1))[FACTOR * count + expert]; }
};

struct Used {  // an expert that has places
  int64_t expert, begin, count;
};

template <typename T>
struct Dense {
  const Table& w;
  T* rows;
  Dense(const Table& w, uint8_t* room, int64_t) : w(w), rows((T*)room) {}
  static int64_t bytes(const Table& w, int64_t places) { return aligned(places * w.depth * sizeof(T)); }
  void take(int64_t place, int64_t, const T* x) const { memcpy(rows + place * w.depth, x, w.depth * sizeof(T)); }

  struct Share {
    int64_t width, piece;  // columns that a thread takes at a time
    int64_t columns(const Used& u) const { return u.count > dense::MANY ? dense::COLUMNS : piece; }
    int64_t units(const Used& u) const { return (width + columns(u) - 1) / columns(u); }
  };
  dense::Product<T> product(const Used& u) const {
    const T* const weight = w.of<const T>(Table::WEIGHT, u.expert);
    return {rows + u.begin * w.depth, weight, nullptr, u.count, w.width, w.depth, w.depth, w.depth};
  }
  Share share(const Used* used, int64_t num_used) const {
    const int64_t even = num_used * w.width / (4 * omp_get_num_threads()) / dense::FEW * dense::FEW;
    return {w.width, num_used ? dense::least(dense::piece_of(product(*used)), dense::most(dense::FEW, even)) : 1};
  }
  void multiply(T* out, const Share& share, const Used& u, int64_t unit, const Used& next, int64_t next_unit) const {
    const auto p = product(u), then = product(next);
    const int64_t n = unit * share.columns(u), after = next_unit * share.columns(next);
    T* const to = out + u.begin * w.width;
    if (u.count <= dense::MANY) return dense::few(to, p, n, dense::least(n + share.piece, w.width), then.w + after * w.depth);
    const int64_t bands = (u.count + dense::MAX_ROWS - 1) / dense::MAX_ROWS, tiles = (u.count + dense::ROWS - 1) / dense::ROWS;
    for (int64_t band = 0; band < bands; band++) {
      const int64_t begin = tiles * band / bands * dense::ROWS, end = tiles * (band + 1) / bands * dense::ROWS;
      const int64_t num_after = band + 1 < bands ? 0 : dense::least(dense::COLUMNS, w.width - after);
      dense::strip(to, p, begin, dense::least(end, u.count), n, then.w + after * w.depth, num_after);
    }
  }
};

// What both formats of panels share: the places of one expert are its panels by bands of its rows.
struct PanelShare {
  int64_t width, band, num_used;
  ::Share of(const Used& u) const { return {width, u.count, band}; }
  int64_t chunk(const ::Share& s) const { return s.each * s.bands * num_used / (8 * omp_get_num_threads()) + 1; }
  int64_t units(const Used& u) const {
    const ::Share s = of(u);
    return (s.each * s.bands + chunk(s) - 1) / chunk(s);
  }
  // f(p, N, each, begin, count) for all of a unit
  template <class F>
  void each(const Used& u, int64_t unit, F f) const {
    const ::Share s = of(u);
    const int64_t all = s.each * s.bands, end = (unit + 1) * chunk(s) < all ? (unit + 1) * chunk(s) : all;
    for (int64_t i = unit * chunk(s); i < end; i++) {
      const int64_t begin = i % s.bands * band;
      const int64_t count = s.rows_at(begin, u.count);
      s.at(i / s.bands, [&](int64_t p, auto columns) { f(p, columns, s.each, u.begin + begin, count); });
    }
  }
};

template <typename T>
constexpr int64_t dtype_of = std::is_same_v<T, bf16> ? BF16 : F32;

template <typename T>
struct Int8 {
  const Table& w;
  int8::Tokens rows;
  Int8(const Table& w, uint8_t* room, int64_t places) : w(w), rows(int8::tokens_in(room, places + SPARE, spread(w.depth))) {}
  static int64_t bytes(const Table& w, int64_t places) {
    return aligned(int8::bytes_of(places + SPARE, spread(w.depth)));
  }
  void take(int64_t place, int64_t, const T* x) const { int8::quantize(rows, place, x, nullptr, w.depth, 0); }

  typedef PanelShare Share;
  Share share(const Used*, int64_t num_used) const { return {w.width, int8::BAND, num_used}; }
  void multiply(T* out, const Share& share, const Used& u, int64_t unit, const Used&, int64_t) const {
    const int8::Weight here{w.of<const uint8_t>(Table::WEIGHT, u.expert), w.of<const float>(Table::SCALE, u.expert), nullptr,
                            int8::quads_of(w.depth), 0};
    const Output to{out, nullptr, w.width, dtype_of<T>, F32};
    share.each(u, unit, [&](int64_t p, auto columns, int64_t each, int64_t begin, int64_t count) {
      int8::panels<columns>(to, rows, here, p, each, begin, count);
    });
  }
};

template <typename T>
struct Grouped {
  const Table& w;
  grouped::Shape shape;
  grouped::Activations rows;
  static grouped::Shape shape_of(const Table& w, int64_t places) {
    return {places + SPARE, w.width, w.depth, w.group_size, (w.depth + w.group_size - 1) / w.group_size, w.block, w.zero};
  }
  Grouped(const Table& w, uint8_t* room, int64_t places)
      : w(w), shape(shape_of(w, places)), rows(grouped::activations_in(room, shape)) {}
  static int64_t bytes(const Table& w, int64_t places) { return aligned(grouped::bytes_of(shape_of(w, places))); }
  void take(int64_t place, int64_t expert, const T* x) const {
    grouped::quantize(rows.row(place), x, w.of<const int32_t>(Table::ORDER, expert), shape);
  }

  typedef PanelShare Share;
  Share share(const Used*, int64_t num_used) const { return {w.width, grouped::BAND, num_used}; }
  void multiply(T* out, const Share& share, const Used& u, int64_t unit, const Used&, int64_t) const {
    using grouped::half;
    const grouped::Weights here{w.of<const uint8_t>(Table::WEIGHT, u.expert), w.of<const half>(Table::SCALE, u.expert),
                                w.of<const half>(Table::OFFSET, u.expert), w.factor(u.expert)};
    const Output to{out, nullptr, w.width, dtype_of<T>, F32};
    share.each(u, unit, [&](int64_t p, auto columns, int64_t each, int64_t begin, int64_t count) {
      if (w.bits == 4)
        grouped::panels<columns, 4>(to, rows, here, shape, p, each, begin, count);
      else
        grouped::panels<columns, 8>(to, rows, here, shape, p, each, begin, count);
    });
  }
};

template <typename T>
struct Fp8 {
  const Table& w;
  Dense<T> rows;
  Fp8(const Table& w, uint8_t* room, int64_t places) : w(w), rows(w, room, places) {}
  static int64_t bytes(const Table& w, int64_t places) { return Dense<T>::bytes(w, places); }
  void take(int64_t place, int64_t expert, const T* x) const { rows.take(place, expert, x); }

  struct Share {
    int64_t width, piece;  // columns that a thread takes at a time
    int64_t units(const Used&) const { return (width + piece - 1) / piece; }
  };
  Share share(const Used*, int64_t num_used) const {
    const int64_t even = num_used * w.width / (4 * omp_get_num_threads()) / 16 * 16;
    return {w.width, dense::least(fp8::PANEL, dense::most(16, even))};
  }
  void multiply(T* out, const Share& share, const Used& u, int64_t unit, const Used&, int64_t) const {
    const fp8::Scales scales{w.of<const float>(Table::SCALE, u.expert), nullptr, w.block, w.group_size,
                             (w.depth + w.group_size - 1) / w.group_size};
    const auto* const weight = w.of<const fp8::code>(Table::WEIGHT, u.expert);
    const fp8::Work<T> work{out + u.begin * w.width, rows.rows + u.begin * w.depth, weight, nullptr, scales, u.count, w.width,
                            w.depth, w.depth, F32};
    fp8::panel(work, unit * share.piece, dense::least((unit + 1) * share.piece, w.width));
  }
};

}  // namespace experts
