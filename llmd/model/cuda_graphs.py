"""Decode steps on a GPU as CUDA graphs (HIP graphs on AMD): one call launches the whole step.

Graphs exist for a ladder of sizes and are captured when a size is first wanted; a step with fewer rows fills its places with
copies of its last row, which compute and store what that row does. All graphs take their memory from one pool: what one
of them leaves there holds until the next is replayed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("llmd.model")

_SMALL = (1, 2, 4)
_STEPS = ((256, 8), (1 << 62, 32))  # up to so many rows, sizes are multiples of this


def ladder(num_rows: int) -> int:
    """The size of the graph that serves so many rows."""
    for size in _SMALL:
        if num_rows <= size:
            return size
    step = next(step for most, step in _STEPS if num_rows <= most)
    return -(-num_rows // step) * step


class CudaCapture:
    """Capture for a device of torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # torch gives its type no name
        self.num_bytes = 0  # that the graphs took

    def size(self, num_rows: int, variant: int) -> int | None:
        """As the protocol says. Which rows use an adapter is told by tensors that are new in each step."""
        return None if variant else ladder(num_rows)

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, torch.cuda.CUDAGraph | None, str]:
        """As the protocol says.

        The step itself runs first and once: that compiles its kernels, and its result is put where replays will leave
        theirs. A capture only writes down what it is given to do.
        """
        result = work()
        begin_s, before = time.perf_counter(), torch.cuda.memory_reserved(self._device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may pin or free memory meanwhile: only what this one does must be fit for a capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                kept = work()
        except (RuntimeError, ValueError) as error:  # also torch.cuda.OutOfMemoryError
            return result, None, f"what a graph cannot hold: {str(error).partition(chr(10))[0]}"
        taken = max(0, torch.cuda.memory_reserved(self._device) - before)
        self.num_bytes += taken
        log.info(
            "captured a decode step of %d rows in %.0f ms; it takes %.1f MB, all graphs %.1f MB",
            kept.shape[0], 1e3 * (time.perf_counter() - begin_s), taken / 1e6, self.num_bytes / 1e6,
        )  # fmt: skip
        return kept.copy_(result), graph, ""
