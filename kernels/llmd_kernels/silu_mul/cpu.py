"""Launches llmd_silu_mul."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library

SILU, GELU, GELU_TANH = 0, 1, 2  # as enum Kind in cpu.cpp


def activate(x: torch.Tensor, kind: int) -> torch.Tensor:
    """x [T, 2·D], contiguous → [T, D] by SILU, GELU or GELU_TANH."""
    num_rows, width = x.shape
    out = torch.empty(num_rows, width // 2, dtype=x.dtype)
    lib = library()
    assert lib is not None
    lib.llmd_silu_mul(out.data_ptr(), x.data_ptr(), num_rows, width // 2, kind, DTYPES[x.dtype])
    return out
