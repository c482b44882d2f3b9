"""How fast a device reads its memory: the ceiling that decode steps are measured against (MBU).

A GPU copies within its memory, at start-up, in milliseconds. A CPU reads, as decoding does, with the threads that decode, a
buffer too large for its caches: about 0.2 s, most of it for getting the memory. So a daemon does it after it is ready, in
slices of some ten milliseconds, while it has nothing to do; a request that comes waits for one slice at most.
"""

from __future__ import annotations

import logging
import mmap
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from llmd.engine.executor import ExecutorInfo
from llmd.engine.roofline import CONTEXT, kv_token_bytes, likely_share, max_decode_rate
from llmd.model.cpu_threads import Threads, cache_bytes
from llmd.model.memory_room import free_memory
from llmd_kernels import native
from llmd_kernels.machine import read_s

log = logging.getLogger("llmd.model")

_BYTES = 128 << 20  # more than caches hold
_NUM_COPIES = 20
_READ_BYTES, _MAX_READ_BYTES, _MIN_READ_BYTES = 256 << 20, 1 << 30, 64 << 20
_SLICE_BYTES = 32 << 20  # taken at once: ten milliseconds of page faults
_NUM_PASSES = 8
_PASSES_S = 0.1


def memory_bandwidth(device: torch.device, num_bytes: int | None = None, num_copies: int = _NUM_COPIES) -> float | None:
    """Bytes a second that a device's memory gives; None where there is no room to try."""
    if device.type == "cpu":
        probe = ReadProbe(num_bytes)
        while not probe.advance():
            pass
        return probe.bandwidth
    return _copy_bandwidth(device, num_bytes or _BYTES, num_copies)


def host_bandwidth(threads: Threads) -> float | None:
    """Bytes a second that these threads read; they are led by a thread of their own, which runs where a model's would."""

    def measure() -> float | None:
        threads.confine()
        native.set_num_threads(threads.count)
        return memory_bandwidth(torch.device("cpu"))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(measure).result()


class ReadProbe:
    """Measures how fast the calling thread and its team read this machine's memory, in slices: the best of a few passes."""

    def __init__(self, num_bytes: int | None = None) -> None:
        self.bandwidth: float | None = None  # bytes a second
        self._num_bytes = _buffer_bytes() if num_bytes is None else num_bytes
        self._buffer: torch.Tensor | None = None
        self._num_touched = 0
        self._passes_s: list[float] = []

    def advance(self) -> bool:
        """Do a slice; whether that was the last one."""
        if not self._num_bytes:
            log.debug("the memory bandwidth is not measured: too little memory is free")
            return True
        if self._buffer is None:
            self._buffer = _take(self._num_bytes)
        if self._num_touched < self._buffer.numel():
            self._buffer[self._num_touched : self._num_touched + _SLICE_BYTES // 4].fill_(1.0)
            self._num_touched += _SLICE_BYTES // 4
            return False
        self._passes_s.append(read_s(self._buffer))
        if len(self._passes_s) < _NUM_PASSES and sum(self._passes_s) < _PASSES_S:
            return False
        self.bandwidth = self._buffer.numel() * 4 / min(self._passes_s)
        self._buffer = None
        return True


def tell_roofline(info: ExecutorInfo, bandwidth: float, num_threads: int) -> None:
    """Keep what was measured among the facts, and log what it means for decoding."""
    info.facts["memory_bandwidth"] = bandwidth
    if not info.kv_bytes:
        return
    weights, per_token = info.facts.get("step_bytes", info.weights_bytes), kv_token_bytes(info)
    limit = max_decode_rate(bandwidth, weights, per_token)
    share = likely_share(info.facts.get("weight_bits", 16.0))
    log.info(
        "memory is read at %.1f GB/s by %d thread%s; a step reads %.1f MB of weights and %.1f KB a token of context: "
        "at most %.1f tok/s for one sequence of %d tokens, likely %.1f (%.0f %%, as was seen with weights of %.0f bits)",
        bandwidth / 1e9, num_threads, "s" if num_threads > 1 else "", weights / 1e6, per_token / 1e3,
        limit, CONTEXT, limit * share, 100 * share, info.facts.get("weight_bits", 16.0),
    )  # fmt: skip


def _buffer_bytes() -> int:
    """Four times what the caches hold, unless memory is short; 0: too short to tell anything."""
    wanted = min(max(_READ_BYTES, 4 * cache_bytes()), _MAX_READ_BYTES)
    room = min(wanted, free_memory() // 4)
    return room // _SLICE_BYTES * _SLICE_BYTES if room >= _MIN_READ_BYTES else 0


def _take(num_bytes: int) -> torch.Tensor:
    """float32 memory that nobody has touched, in huge pages where they may be had: weights lie in them too."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            log.debug("no huge pages: %s", error)
    return torch.frombuffer(memory, dtype=torch.float32)


def _copy_bandwidth(device: torch.device, num_bytes: int, num_copies: int) -> float | None:
    try:
        source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
    except torch.OutOfMemoryError as error:
        log.debug("the memory bandwidth is not measured: %s", error)
        return None
    target.copy_(source)
    _wait(device)
    began_s = time.perf_counter()
    for _ in range(num_copies):
        target.copy_(source)
    _wait(device)
    took_s = time.perf_counter() - began_s
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * num_bytes * num_copies / max(took_s, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
