"""Launches llmd_fp8_linear."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library


def linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    grid: torch.Tensor,
    height: int,
    columns: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K] of a dtype the kernels know, x_scale [M, column blocks], W's grid of scales → [M, N] in x's dtype."""
    if x.stride(1) != 1:
        x = x.contiguous()
    (count, depth), width = x.shape, weight.shape[0]
    out = torch.empty(count, width, dtype=x.dtype)
    if bias is not None and bias.dtype not in DTYPES:
        bias = bias.float()
    lib = library()
    assert lib is not None
    lib.llmd_fp8_linear(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), grid.data_ptr(), None if x_scale is None else x_scale.data_ptr(),
        None if bias is None else bias.data_ptr(), count, width, depth, x.stride(0), height, columns,
        DTYPES[x.dtype], DTYPES[torch.float32 if bias is None else bias.dtype],
    )  # fmt: skip
    return out
