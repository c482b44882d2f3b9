"""Launches llmd_silu_mul."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2·D], contiguous."""
    num_rows, width = x.shape
    out = torch.empty(num_rows, width // 2, dtype=x.dtype)
    lib = library()
    assert lib is not None
    lib.llmd_silu_mul(out.data_ptr(), x.data_ptr(), num_rows, width // 2, DTYPES[x.dtype])
    return out
