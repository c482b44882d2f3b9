"""y = x / sqrt(mean(x²) + eps) · weight over the last dim, with or without a residual added first."""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.rms_norm import cpu, reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dim of x [..., D]; computed in float32, returned contiguous in x's dtype."""
    is_served = x.stride(-1) == 1 and x.dim() in (2, 3)
    if x.is_cuda and is_served:
        from llmd_kernels.rms_norm import triton

        return triton.rms_norm(x, weight, eps)
    if native.is_available(x) and is_served:
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); both [T, D]. `residual` may be overwritten."""
    is_served = x.is_contiguous() and residual.is_contiguous()
    if x.is_cuda and is_served and x.dim() == 2:
        from llmd_kernels.rms_norm import triton

        return triton.add_rms_norm(x, residual, weight, eps)
    if native.is_available(x) and is_served:
        return cpu.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)
