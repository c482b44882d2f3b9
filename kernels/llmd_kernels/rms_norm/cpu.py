"""Launches llmd_rms_norm."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, D] or [T, H, D] with a dense last dim."""
    out = torch.empty(x.shape, dtype=x.dtype)
    inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    lib = library()
    assert lib is not None
    lib.llmd_rms_norm(
        out.data_ptr(), x.data_ptr(), None, weight.data_ptr(), eps,
        x.shape[0], x.stride(0), inner, inner_stride, x.shape[-1], DTYPES[x.dtype],
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds x into residual in place, then normalises."""
    out = torch.empty_like(x)
    lib = library()
    assert lib is not None
    dim = x.shape[-1]
    lib.llmd_rms_norm(
        out.data_ptr(), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps,
        x.shape[0], dim, 1, 0, dim, DTYPES[x.dtype],
    )  # fmt: skip
    return out, residual
