// The machine itself: how fast its memory is read, and where the threads of a team run.
#include "common.h"
#ifdef __linux__
#include <sched.h>
#endif

constexpr int64_t LINE = 64, STREAMS = 4;

// All of [begin, end), as several streams: one alone waits for memory longer than it reads.
static inline vi read(const char* begin, int64_t bytes) {
  int64_t span = bytes / (STREAMS * LINE) * LINE;
  vi sums[STREAMS] = {};
  for (int64_t i = 0; i < span; i += LINE)
    EACH(s, STREAMS) sums[s] ^= *(const vi*)(begin + s * span + i); END
  for (int64_t i = STREAMS * span; i + LINE <= bytes; i += LINE) sums[0] ^= *(const vi*)(begin + i);
  return (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
}

// Each thread reads a piece of its own, as it does with the rows of a matrix. `found` keeps the reading from being left out.
EXPORT void llmd_read_pass(const void* data, int64_t bytes, void* found) {
  int32_t all = 0;
  int64_t count = threads();
#pragma omp parallel for num_threads(count) schedule(static) reduction(^ : all)
  for (int64_t part = 0; part < count; part++) {
    int64_t lines = bytes / LINE, begin = lines * part / count, end = lines * (part + 1) / count;
    vi x = read((const char*)data + begin * LINE, (end - begin) * LINE);
    for (int i = 0; i < L; i++) all ^= x[i];
  }
  *(int32_t*)found = all;
}

// Thread i of the calling thread's team onto cpus[i]; the first is the caller itself and stays free, for threads that it
// starts later inherit where it may run. Says how many were moved.
EXPORT void llmd_pin_threads(const int64_t* cpus, int64_t count, void* moved) {
  int32_t done = 0;
#ifdef __linux__
#pragma omp parallel num_threads(count) reduction(+ : done)
  if (int i = omp_get_thread_num(); i > 0) {
    cpu_set_t* set = CPU_ALLOC(cpus[i] + 1);
    size_t size = CPU_ALLOC_SIZE(cpus[i] + 1);
    CPU_ZERO_S(size, set);
    CPU_SET_S(cpus[i], size, set);
    done += sched_setaffinity(0, size, set) == 0;
    CPU_FREE(set);
  }
#endif
  *(int32_t*)moved = done;
}
