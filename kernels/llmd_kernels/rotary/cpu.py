"""Launches llmd_rotary."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """q [T, H, D] and k [T, K, D] with dense heads; rows may be strided."""
    lib = library()
    assert lib is not None
    lib.llmd_rotary(
        q.data_ptr(), k.data_ptr(), positions.data_ptr(), cos_sin.data_ptr(),
        q.shape[0], q.shape[1], k.shape[1], q.shape[2], cos_sin.shape[1], q.stride(0), k.stride(0),
        cos_sin.shape[0], DTYPES[q.dtype],
    )  # fmt: skip
