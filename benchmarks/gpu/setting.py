"""What a worker's cases are told, and how they take times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

_FLUSH_BYTES = 256 << 20  # more than a device's caches


class Uncapturable(RuntimeError):
    """No graph can hold a call; the process may not be fit for more graphs. `figures` are what was found before."""

    figures: dict[str, Any] | None = None


class Setting(NamedTuple):
    """One worker's."""

    device: torch.device
    is_tiny: bool
    model: str
    folder: Path  # for what cases leave behind
    ceilings: dict[str, float]  # copy_gb_s, matmul_tflop_s; empty where they were not measured

    def share(self, ceiling: str, value: float) -> float | None:
        """Of a ceiling that was measured in this run."""
        most = self.ceilings.get(ceiling)
        return round(value / most, 3) if most else None


class Work(NamedTuple):
    """One kernel's call, and the plain way to the same."""

    ours: Callable[[], Any]
    torch: Callable[[], Any] | None
    num_bytes: int = 0  # read and written, at least
    flops: int = 0
    waits: bool = False  # torch's way waits for the device: no graph can hold it


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(setting: Setting, work: Callable[[], Any], repeats: int = 20, *, as_graph: bool = False) -> float:
    """Of one call on the device, with cold caches; the first calls, which compile, do not count.

    `as_graph` replays the call as a graph, so that what the host takes to launch it is not measured. Raises Uncapturable for
    a call that no graph can hold.
    """
    for _ in range(1 if setting.is_tiny else 3):
        work()
    wait(setting.device)
    if setting.device.type != "cuda":
        return 1e3 * statistics.median(_seconds(work) for _ in range(2))
    if as_graph:
        work = _as_graph(work)
        work()
    scratch = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device=setting.device)
    events = []
    for _ in range(repeats):
        scratch.sum()  # read, not written: no dirty lines of it are put back in the measured time
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        events.append((begin, end))
    wait(setting.device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def _as_graph(work: Callable[[], Any]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    except RuntimeError as error:
        raise Uncapturable(str(error).partition("\n")[0]) from error
    return graph.replay


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
