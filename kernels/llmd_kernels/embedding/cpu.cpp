#include "common.h"

// out[i] = table[ids[i]]; an id outside the table stands for the nearest one inside.
EXPORT void llmd_embedding(void* out, const int64_t* ids, const void* table, int64_t count, int64_t num_ids, int64_t dim,
                           int64_t stride, int64_t dtype) {
  int64_t item = dtype == BF16 ? sizeof(bf16) : sizeof(float);
  team(count * dim * item, [=] {
#pragma omp for
    for (int64_t i = 0; i < count; i++) {
      int64_t id = ids[i] < 0 ? 0 : ids[i] < num_ids ? ids[i] : num_ids - 1;
      memcpy((char*)out + i * dim * item, (const char*)table + id * stride * item, dim * item);
    }
  });
}
REPLAYABLE(llmd_embedding)
