// A recorded step, run again: one op after another by one team, which no barrier but the ops' own holds up and no
// interpreter feeds. What changes from step to step is read by the ops from memory that stays where it is.
#include "common.h"

struct Call {
  void (*op)(const Argument*);
  const Argument* arguments;
};

EXPORT void llmd_replay(const Call* calls, int64_t count) {
#pragma omp parallel num_threads(threads())
  for (int64_t i = 0; i < count; i++) calls[i].op(calls[i].arguments);
}

EXPORT void llmd_set_num_threads(int64_t count) { threads() = count < 1 ? 1 : (int)count; }
EXPORT void llmd_get_num_threads(int64_t* count) { *count = threads(); }
