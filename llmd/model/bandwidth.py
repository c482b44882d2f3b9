"""How fast a device reads its memory: the ceiling that decode steps are measured against (MBU)."""

from __future__ import annotations

import logging
import time

import torch

log = logging.getLogger("llmd.model")

_BYTES = 128 << 20  # more than caches hold
_NUM_COPIES = 20


def memory_bandwidth(device: torch.device, num_bytes: int = _BYTES, num_copies: int = _NUM_COPIES) -> float | None:
    """Bytes a second that copies within a device's memory read and write; None where there is no room to try."""
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
