"""Work on a GPU as CUDA graphs (HIP graphs on AMD): one call launches a whole step.

Graphs exist for a ladder of sizes; a step with fewer rows fills its places with spare lines. All graphs take their memory
from one pool: what one of them leaves there holds until the next is replayed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from llmd.model.out_of_memory import is_out_of_memory
from llmd.model.staging import on_stream

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


def sizes_of(max_num_rows: int) -> tuple[int, ...]:
    """The ladder's sizes, rising; the last is the largest number of rows itself."""
    sizes, rows = [], 0
    while rows < max_num_rows:
        rows = min(ladder(rows + 1), max_num_rows)
        sizes.append(rows)
    return tuple(sizes)


class CudaCapture:
    """Capture for a device of torch.cuda."""

    is_free = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # torch gives its type no name
        self._stream: Any = None
        self.num_bytes = 0  # that the graphs took

    def sizes(self, max_num_rows: int) -> tuple[int, ...]:
        """As the protocol says."""
        return sizes_of(max_num_rows)

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, torch.cuda.CUDAGraph | None, str]:
        """As the protocol says.

        The work itself is done first and once: that compiles its kernels, and its result is put where replays will leave
        theirs. A capture only writes down what it is given to do, and waits for nothing.
        """
        result = work()
        begin_s, before = time.perf_counter(), self._taken()
        graph = torch.cuda.CUDAGraph()
        try:
            kept = self._capture(graph, work)
        except (RuntimeError, ValueError) as error:  # also torch.cuda.OutOfMemoryError
            lacks_memory = is_out_of_memory(error)
            return result, None, "" if lacks_memory else f"what a graph cannot hold: {str(error).partition(chr(10))[0]}"
        taken = max(0, self._taken() - before)
        self.num_bytes += taken
        log.debug(
            "captured work of %d rows in %.0f ms; it takes %.1f MB, all graphs %.1f MB",
            kept.shape[0], 1e3 * (time.perf_counter() - begin_s), taken / 1e6, self.num_bytes / 1e6,
        )  # fmt: skip
        return kept.copy_(result), graph, ""

    def _capture(self, graph: torch.cuda.CUDAGraph, work: Callable[[], Tensor]) -> Tensor:
        """torch.cuda.graph without its waiting for the device and its emptying of caches: a step may be under way."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream(self._device)
        with on_stream(self._stream):
            # Other threads may pin or free memory meanwhile: only what this one does must be fit for a capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                kept = work()
            except BaseException:
                with suppress(RuntimeError):  # the capture is known to be broken
                    graph.capture_end()
                raise
            graph.capture_end()
        return kept

    def _taken(self) -> int:
        """Bytes of the device that this process has, graphs' own included; noise of neighbours too."""
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free
