"""Rotary position embedding, in place: pairs (i, i + R/2) of a head's first R dims are turned by the position's angle."""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.rotary import cpu, reference


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Turn q [T, H, D] and k [T, K, D] in place.

    positions: [T] int64. cos_sin: [max_position, R] float32, the cosines of the R/2 angles and then their sines.
    """
    is_dense = q.stride(-1) == 1 and k.stride(-1) == 1 and q.stride(1) == k.stride(1) == q.shape[2]
    if q.is_cuda and is_dense:
        from llmd_kernels.rotary import triton

        triton.rotary(q, k, positions, cos_sin)
    elif native.is_available(q) and is_dense:
        cpu.rotary(q, k, positions, cos_sin)
    else:
        reference.rotary(q, k, positions, cos_sin)
