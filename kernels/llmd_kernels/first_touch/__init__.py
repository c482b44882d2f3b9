"""Pages of fresh memory, each on the NUMA node of the thread that will read it; with one node there is no choice."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from llmd_kernels import native


def first_touch(tensor: torch.Tensor) -> None:
    """Touch a dense tensor whose contents do not matter yet, with the threads that kernels share its rows among."""
    if num_nodes() > 1 and tensor.is_cpu and (lib := native.library()) is not None:
        lib.llmd_first_touch(tensor.data_ptr(), tensor.numel() * tensor.itemsize)


@functools.cache
def num_nodes() -> int:
    """NUMA nodes of this machine, one where it does not tell."""
    return max(1, sum(1 for _ in Path("/sys/devices/system/node").glob("node[0-9]*")))
