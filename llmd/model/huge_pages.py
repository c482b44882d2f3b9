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
_MADV_POPULATE_WRITE = 23  # of Linux 5.14; Python has no name for it
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


class Prepared(NamedTuple):
    """Memory, and the thread that still makes the rest of it ready: it may be used, and given back when that has ended."""

    memory: Memory
    thread: threading.Thread


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
        self._thread: threading.Thread | None = None
        self._memory: Memory | None = None

    def prepare(self, size: int) -> None:
        with self._lock:
            if self._memory is not None or (memory := map_huge(size)) is None:
                return
            self._memory = memory
            self._thread = threading.Thread(target=_populate, args=(memory,), name="llmd-memory", daemon=True)
            self._thread.start()

    def take(self) -> Prepared | None:
        with self._lock:
            thread, memory, self._thread, self._memory = self._thread, self._memory, None, None
        return None if thread is None or memory is None else Prepared(memory, thread)


_ready = _Ready()


def prepare(size: int) -> None:
    """Begin to make `size` bytes ready, where the system can do so in a thread and memory is plentiful."""
    if sys.platform != "linux" or size < HUGE_PAGE or free_memory() < _PLENTY * size + _PLENTY_BYTES:
        return
    try:
        _ready.prepare(size)
    except MemoryError as error:  # whoever needs it will say so
        log.debug("%s", error)


def take_prepared() -> Prepared | None:
    """What `prepare` was asked for; it is the caller's then."""
    return _ready.take()


def _populate(memory: Memory) -> None:
    """A foreign call: other threads run meanwhile. A kernel that cannot do it leaves the pages to their first touch."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if madvise(memory.address, -(-memory.size // mmap.PAGESIZE) * mmap.PAGESIZE, _MADV_POPULATE_WRITE):
        log.debug("memory is not made ready: error %d", ctypes.get_errno())
