// Fresh memory gets its pages near the core that touches it first: here each thread touches what the static shares of the
// other kernels will have it read.
#include "common.h"

constexpr int64_t PAGE = 4096;

EXPORT void llmd_first_touch(char* memory, int64_t bytes) {
  team(bytes, [&] {
#pragma omp for schedule(static)
    for (int64_t page = 0; page < bytes; page += PAGE) *(volatile char*)(memory + page) = 0;
  });
}
