"""The machine itself: how fast its memory is read by the threads that kernels use, and where those threads run."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import torch

from llmd_kernels import native


def read_s(x: torch.Tensor) -> float:
    """Seconds that one pass over x [any, contiguous, on the CPU] takes, read and not written."""
    if not (x.is_cpu and x.is_contiguous() and x.dtype == torch.float32):
        raise ValueError(f"a pass needs contiguous float32 on the CPU, got {x.dtype} on {x.device}")
    lib = native.library()
    found = ctypes.c_int32()
    began_s = time.perf_counter()
    if lib is None:
        x.sum()
    else:
        lib.llmd_read_pass(x.data_ptr(), x.numel() * x.element_size(), ctypes.addressof(found))
    return time.perf_counter() - began_s


def pin_threads(cpus: Sequence[int]) -> int:
    """Keep thread i > 0 of the calling thread's team on cpus[i]; how many were moved, 0 where that cannot be done."""
    lib = native.library()
    if lib is None or len(cpus) < 2:
        return 0
    places = (ctypes.c_int64 * len(cpus))(*cpus)
    moved = ctypes.c_int32()
    lib.llmd_pin_threads(ctypes.addressof(places), len(cpus), ctypes.addressof(moved))
    return moved.value
