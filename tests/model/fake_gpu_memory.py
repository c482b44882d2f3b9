"""A GPU's memory without the GPU: what torch's allocator of this process holds, and what others take beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

MIB, GIB = 1 << 20, 1 << 30


class FakeGpuMemory:
    """Numbers that tests move; `take` and `give` are what tensors of this process do."""

    def __init__(self, total: int, others: int) -> None:
        self.total, self.others = total, others
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.num_emptied = 0

    def take(self, num_bytes: int, wasted: int = 0) -> None:
        """A tensor, with what its segment wastes. Raises OutOfMemoryError as torch does."""
        if num_bytes + wasted > self.free:
            raise torch.OutOfMemoryError("out of memory")
        self.allocated += num_bytes
        self.reserved += num_bytes + wasted
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def give(self, num_bytes: int) -> None:
        """A tensor goes; its segment stays with the allocator."""
        self.allocated -= num_bytes

    @property
    def free(self) -> int:
        return self.total - self.others - self.reserved

    def reset_peak(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def empty(self) -> None:
        self.num_emptied += 1
        self.reserved = self.allocated


@contextlib.contextmanager
def fake_gpu_memory(total: int, others: int = 0) -> Iterator[FakeGpuMemory]:
    """torch.cuda tells of such a device."""
    memory = FakeGpuMemory(total, others)
    answers = {
        "mem_get_info": lambda *_: (memory.free, memory.total), "memory_reserved": lambda *_: memory.reserved,
        "memory_allocated": lambda *_: memory.allocated, "max_memory_allocated": lambda *_: memory.peak_allocated,
        "max_memory_reserved": lambda *_: memory.peak_reserved, "synchronize": lambda *_: None,
        "reset_peak_memory_stats": lambda *_: memory.reset_peak(), "empty_cache": memory.empty,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield memory
