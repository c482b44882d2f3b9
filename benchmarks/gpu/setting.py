"""What a worker's cases are told, and how they take times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

_FLUSH_BYTES = 256 << 20  # more than a device's caches


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


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(setting: Setting, work: Callable[[], Any], repeats: int = 20) -> float:
    """Of one call on the device, with cold caches; the first calls, which compile, do not count."""
    for _ in range(1 if setting.is_tiny else 3):
        work()
    wait(setting.device)
    if setting.device.type != "cuda":
        return 1e3 * statistics.median(_seconds(work) for _ in range(2))
    scratch = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=setting.device)
    events = []
    for _ in range(repeats):
        scratch.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        events.append((begin, end))
    wait(setting.device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
