"""Anonymous memory in pages of 2 MiB, also some that is made ready in a thread while torch is imported. Loads no torch.

The first touch of fresh memory is not free: the kernel clears it, and in a virtual machine the host may have to find it
first, which was seen to take more than a second a gigabyte. While Python imports on one core, another can do that.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import threading
from typing import NamedTuple

from llmd.model.memory_room import free_memory

log = logging.getLogger("llmd.model")

HUGE_PAGE = 2 << 20
_AT_ONCE = 16 << 20  # bytes
_PLENTY = 3  # times what is made ready must be free: whether a model fits is reckoned later, by who knows all it takes
_PLENTY_BYTES = 4 << 30  # and so much beside it


class Memory(NamedTuple):
    """`size` bytes of a mapping from `start`, where its first huge page begins."""

    mapping: mmap.mmap
    start: int
    size: int

    @property
    def address(self) -> int:
        """Where it lies."""
        return address_of(self.mapping) + self.start

    def give_back(self, start: int) -> None:
        """Let the system have the pages from an offset of the mapping on."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if first < len(self.mapping):
            self.mapping.madvise(mmap.MADV_DONTNEED, first, len(self.mapping) - first)


def map_huge(size: int) -> Memory | None:
    """Memory for `size` bytes; None where the system has no huge pages to ask for. Raises MemoryError."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes of weights: {error}") from None
    start = -address_of(mapping) % HUGE_PAGE
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE, start, size)
    except OSError as error:  # a kernel that was built without them
        log.debug("no huge pages for weights: %s", error)
    return Memory(mapping, start, size)


def address_of(mapping: mmap.mmap) -> int:
    """Where a writable mapping lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


class _Ready:
    """Memory that a thread is making ready, for whoever takes it first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = threading.Event()
        self._thread: threading.Thread | None = None
        self._memory: Memory | None = None

    def prepare(self, size: int) -> None:
        with self._lock:
            if self._memory is not None or (memory := map_huge(size)) is None:
                return
            self._memory = memory
            self._is_taken.clear()
            self._thread = threading.Thread(target=self._touch, args=(memory,), name="llmd-memory", daemon=True)
            self._thread.start()

    def take(self) -> Memory | None:
        with self._lock:
            thread, memory, self._thread, self._memory = self._thread, self._memory, None, None
        if thread is not None:
            self._is_taken.set()
            thread.join()
        return memory

    def _touch(self, memory: Memory) -> None:
        """By plain stores, in a foreign call: the system call that is made for this keeps others from mapping libraries."""
        for start in range(0, memory.size, _AT_ONCE):
            if self._is_taken.is_set():
                return
            ctypes.memset(memory.address + start, 0, min(_AT_ONCE, memory.size - start))


_ready = _Ready()


def prepare(size: int) -> None:
    """Begin to make `size` bytes ready, where the system can do so in a thread and memory is plentiful."""
    if sys.platform != "linux" or size < HUGE_PAGE or free_memory() < _PLENTY * size + _PLENTY_BYTES:
        return
    try:
        _ready.prepare(size)
    except MemoryError as error:  # whoever needs it will say so
        log.debug("%s", error)


def take_prepared() -> Memory | None:
    """What `prepare` was asked for, as far as it is ready; it is the caller's then."""
    return _ready.take()
