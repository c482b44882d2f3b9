"""What else the machine does, how fast it reads its memory, and what a group of processes has used. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_IDLE_FIELDS = (3, 4)  # of the first line of /proc/stat: idle, waiting for a disk
_GUEST_FIELD = 8  # guests' time, and that which follows, are counted in user's already
_PASS_BYTES = 256 << 20


def busy_s() -> float:
    """CPU time that this machine has spent on anything since its start, what its host took from it included."""
    fields = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    counted = (int(field) for i, field in enumerate(fields[:_GUEST_FIELD]) if i not in _IDLE_FIELDS)
    return sum(counted) / os.sysconf("SC_CLK_TCK")


class Use(NamedTuple):
    """CPU time of the whole machine and of one group of processes at a moment."""

    at_s: float
    busy_s: float
    own_s: float

    @classmethod
    def now(cls, group: int | None = None) -> Use:
        """Of a process group, or of this process."""
        return cls(time.perf_counter(), busy_s(), time.process_time() if group is None else group_cpu_s(group))

    def foreign_until(self, later: Use) -> float:
        """Share of the machine, 0 to 1, that others took between the two moments; ticks of 10 ms make short ones rough."""
        others = later.busy_s - self.busy_s - (later.own_s - self.own_s)
        return min(1.0, max(0.0, others) / ((later.at_s - self.at_s) * (os.cpu_count() or 1)))


class Quiet(NamedTuple):
    """What a check found."""

    foreign: float  # share of the machine that others took in the last window
    waited_s: float
    is_quiet: bool


def wait_until_quiet(limit: float = 0.03, window_s: float = 0.5, bound_s: float = 20.0) -> Quiet:
    """Watch what others use until they take at most `limit` of the machine for a window, or `bound_s` have passed."""
    began = time.perf_counter()
    while True:
        before = Use.now()
        time.sleep(window_s)
        foreign = before.foreign_until(Use.now())
        waited = time.perf_counter() - began
        if foreign <= limit or waited >= bound_s:
            return Quiet(foreign, waited, foreign <= limit)


# --- processes


def _members(group: int) -> Iterator[tuple[Path, list[str]]]:
    """Each process of the group, with the fields of its stat that follow its name."""
    for folder in PROC.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == group:
            yield folder, fields


def group_cpu_s(group: int) -> float:
    """User and system time of the group's processes and of their children that have ended."""
    ticks = sum(sum(map(int, fields[11:15])) for _, fields in _members(group))
    return ticks / os.sysconf("SC_CLK_TCK")


def group_peak_bytes(group: int) -> int:
    """Sum of the most memory that each of the group's processes has had resident."""
    peaks = 0
    for folder, _ in _members(group):
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:
            continue
        peaks += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    return peaks


# --- memory


def read_bandwidth(threads: int, seconds: float = 0.4) -> float:
    """Bytes a second that `threads` read together: the best of the passes over 256 MiB that fit into the time.

    Each thread has libc's memchr look for a byte that is not there: vector loads and a compare, nothing is written.
    """
    memchr = ctypes.CDLL(None).memchr
    memchr.restype, memchr.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    with mmap.mmap(-1, _PASS_BYTES) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        view = (ctypes.c_char * _PASS_BYTES).from_buffer(memory)
        address, part = ctypes.addressof(view), _PASS_BYTES // threads
        ctypes.memset(address, 1, _PASS_BYTES)  # a page that was never written is the same zeros everywhere
        with ThreadPoolExecutor(threads) as pool:
            best, until = 0.0, time.perf_counter() + seconds
            while time.perf_counter() < until:
                began = time.perf_counter()
                list(pool.map(lambda i: memchr(address + i * part, 0, part), range(threads)))
                best = max(best, part * threads / (time.perf_counter() - began))
        del view
    return best
