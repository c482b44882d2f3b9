// Two passes in one parallel region. Shrink: hidden[token, part, r] = x[token] . A[slot, part, r], four rows of A at a time
// for up to four tokens of the same slot. Expand: y[token] += sum over r of hidden * B[slot, r], in tiles of columns that stay
// in registers while r runs, so that every row of B is read once for four tokens.
#include "common.h"
#include <vector>

struct Unit {
  int32_t slot, part, begin, end;  // tokens [begin, end) of the sorted ones
  int64_t first, last;             // ranks, or columns
};

constexpr int64_t TOKENS = 32;   // a unit's at most
constexpr int64_t RANKS = 4;     // rows of A a unit
constexpr int64_t COLUMNS = 1024;  // of B a unit

template <int M, int N, typename T>
static void dots(float* out, int64_t out_stride, const T* const* x, const T* a, int64_t depth) {
  vf acc[M * N];
  EACH(i, M * N) acc[i] = vf{}; END
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    vf w[N];
    EACH(n, N)
      w[n] = load(a + n * depth + k);
      __builtin_prefetch(a + (n + 2 * N) * depth + k, 0, 1);  // rows to come, into the second level
    END
    EACH(m, M)
      vf v = load(x[m] + k);
      EACH(n, N) acc[m * N + n] += v * w[n]; END
    END
  }
  EACH(m, M)
    EACH(n, N)
      float total = sum(acc[m * N + n]);
      for (int64_t rest = k; rest < depth; rest++) total += widen(x[m][rest]) * widen(a[n * depth + rest]);
      out[m * out_stride + n] = total;
    END
  END
}

template <int N, typename T>
static void shrink_rows(float* out, int64_t out_stride, const T* x, int64_t x_stride, const int32_t* tokens, int64_t count,
                        const T* a, int64_t depth) {
  const T* rows[4];
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) {
    for (int i = 0; i < 4; i++) rows[i] = x + tokens[m + i] * x_stride;
    dots<4, N>(out + m * out_stride, out_stride, rows, a, depth);
  }
  for (; m < count; m++) {
    rows[0] = x + tokens[m] * x_stride;
    dots<1, N>(out + m * out_stride, out_stride, rows, a, depth);
  }
}

template <int M, int N, typename T, typename Y>
static void tile(Y* const* y, const float* const* hidden, const T* b, int64_t b_stride, int64_t rank) {
  vf acc[M * N];
  EACH(i, M * N) acc[i] = vf{}; END
  for (int64_t r = 0; r < rank; r++) {
    vf w[N];
    EACH(n, N) w[n] = load(b + r * b_stride + n * L); END
    EACH(m, M)
      vf h = splat(hidden[m][r]);
      EACH(n, N) acc[m * N + n] += h * w[n]; END
    END
  }
  EACH(m, M)
    EACH(n, N) store(y[m] + n * L, load(y[m] + n * L) + acc[m * N + n]); END
  END
}

// Columns [0, count) from where y and b point, for M tokens.
template <int M, typename T, typename Y>
static void expand_row(Y** y, const float* const* hidden, const T* b, int64_t b_stride, int64_t rank, int64_t count) {
  constexpr int N = 4;
  int64_t c = 0;
  auto advance = [&](int64_t by) {
    for (int m = 0; m < M; m++) y[m] += by;
    b += by, c += by;
  };
  for (; c + N * L <= count; advance(N * L)) tile<M, N>(y, hidden, b, b_stride, rank);
  for (; c + L <= count; advance(L)) tile<M, 1>(y, hidden, b, b_stride, rank);
  for (int64_t rest = 0; rest < count - c; rest++)
    for (int m = 0; m < M; m++) {
      float total = widen(y[m][rest]);
      for (int64_t r = 0; r < rank; r++) total += hidden[m][r] * widen(b[r * b_stride + rest]);
      narrow(y[m] + rest, total);
    }
}

template <int R, typename T>
static void add_rows(float* sums, const float* hidden, const T* b, int64_t b_stride, int64_t count) {
  for (int64_t c = 0; c < count; c += L) {
    vf total = load(sums + c);
    EACH(r, R)
      total += splat(hidden[r]) * load(b + r * b_stride + c);
      if (c % (2 * L) == 0) __builtin_prefetch(b + (r + R) * b_stride + c, 0, 1);  // rows to come
    END
    store(sums + c, total);
  }
}

// One token alone reads B from memory: long runs of few rows at a time, which is what memory gives fastest.
template <typename T, typename Y>
static void expand_one(Y* y, const float* hidden, const T* b, int64_t b_stride, int64_t rank, int64_t count) {
  float sums[COLUMNS] = {};
  const int64_t whole = count / L * L;
  int64_t r = 0;
  for (; r + 4 <= rank; r += 4) add_rows<4>(sums, hidden + r, b + r * b_stride, b_stride, whole);
  for (; r < rank; r++) add_rows<1>(sums, hidden + r, b + r * b_stride, b_stride, whole);
  for (int64_t c = 0; c < whole; c += L) store(y + c, load(y + c) + load(sums + c));
  y += whole, b += whole;
  expand_row<1>(&y, &hidden, b, b_stride, rank, count - whole);
}

template <typename T, typename Y>
static void run(Y* y, const T* x, const T* a, const T* b, const int32_t* ranks, const int32_t* tokens, const int32_t* starts,
                const int64_t* part_starts, float* hidden, int64_t num_slots, int64_t num_parts, int64_t max_rank,
                int64_t depth, int64_t width, int64_t x_stride, int64_t y_stride) {
  std::vector<Unit> shrinks, expands;
  int64_t work = 0;
  for (int32_t slot = 0; slot < num_slots; slot++)
    for (int32_t begin = starts[slot]; begin < starts[slot + 1]; begin += TOKENS) {
      const int32_t end = begin + TOKENS < starts[slot + 1] ? begin + TOKENS : starts[slot + 1];
      for (int32_t part = 0; part < num_parts; part++) {
        const int64_t rank = ranks[slot * num_parts + part];
        if (!rank) continue;
        for (int64_t r = 0; r < rank; r += RANKS) shrinks.push_back({slot, part, begin, end, r, r + RANKS < rank ? r + RANKS : rank});
        const int64_t last = part_starts[part + 1];
        for (int64_t c = part_starts[part]; c < last; c += COLUMNS)
          expands.push_back({slot, part, begin, end, c, c + COLUMNS < last ? c + COLUMNS : last});
        work += rank * (depth + last - part_starts[part]) * (int64_t)sizeof(T);
      }
    }
  const int64_t hidden_stride = num_parts * max_rank;
  team(work, [&] {
#pragma omp for schedule(static)
    for (size_t i = 0; i < shrinks.size(); i++) {
      const Unit u = shrinks[i];
      const T* from = a + ((u.slot * num_parts + u.part) * max_rank + u.first) * depth;
      float* out = hidden + u.begin * hidden_stride + u.part * max_rank + u.first;
      if (u.last - u.first == RANKS)
        shrink_rows<RANKS>(out, hidden_stride, x, x_stride, tokens + u.begin, u.end - u.begin, from, depth);
      else
        for (int64_t r = 0; r < u.last - u.first; r++)
          shrink_rows<1>(out + r, hidden_stride, x, x_stride, tokens + u.begin, u.end - u.begin, from + r * depth, depth);
    }
#pragma omp for schedule(static)
    for (size_t i = 0; i < expands.size(); i++) {
      const Unit u = expands[i];
      const int64_t rank = ranks[u.slot * num_parts + u.part];
      const T* from = b + u.slot * max_rank * width + u.first;
      Y* rows[4];
      const float* h[4];
      int64_t m = u.begin;
      auto point = [&](int64_t count) {
        for (int64_t j = 0; j < count; j++) {
          rows[j] = y + tokens[m + j] * y_stride + u.first;
          h[j] = hidden + (m + j) * hidden_stride + u.part * max_rank;
        }
      };
      for (; m + 4 <= u.end; m += 4) point(4), expand_row<4>(rows, h, from, width, rank, u.last - u.first);
      for (; m < u.end; m++) point(1), expand_one(rows[0], h[0], from, width, rank, u.last - u.first);
    }
  });
}

EXPORT void llmd_lora(void* y, const void* x, const void* a, const void* b, const int32_t* ranks, const int32_t* tokens,
                      const int32_t* starts, const int64_t* part_starts, float* hidden, int64_t num_slots, int64_t num_parts,
                      int64_t max_rank, int64_t depth, int64_t width, int64_t x_stride, int64_t y_stride, int64_t dtype,
                      int64_t y_dtype) {
  auto call = [&](auto* out, auto* type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    run(out, (const T*)x, (const T*)a, (const T*)b, ranks, tokens, starts, part_starts, hidden, num_slots, num_parts,
        max_rank, depth, width, x_stride, y_stride);
  };
  if (dtype == BF16)
    y_dtype == BF16 ? call((bf16*)y, (bf16*)nullptr) : call((float*)y, (bf16*)nullptr);
  else
    y_dtype == BF16 ? call((bf16*)y, (float*)nullptr) : call((float*)y, (float*)nullptr);
}
REPLAYABLE(llmd_lora)
