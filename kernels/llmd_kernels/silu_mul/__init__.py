"""silu(gate) · up, the gated activation of Llama-like MLPs."""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.silu_mul import cpu, reference


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2·D], gate first, → [T, D]."""
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"silu_mul wants [T, 2*D], got {tuple(x.shape)}")
    if native.is_available(x) and x.is_contiguous():
        return cpu.silu_mul(x)
    return reference.silu_mul(x)
