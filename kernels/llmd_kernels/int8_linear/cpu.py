"""Launches llmd_quantize_rows and llmd_int8_linear."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    row_sums: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    x_zero: int,
) -> torch.Tensor:
    """x [M, K] with dense rows, weight [N, K] int8, x_scale one float32 or None → [M, N] in x's dtype."""
    (count, depth), width = x.shape, weight.shape[0]
    quantized = torch.empty(count, depth, dtype=torch.uint8)
    token_scale = torch.empty(count, dtype=torch.float32)
    out = torch.empty(count, width, dtype=x.dtype)
    lib = library()
    assert lib is not None
    dtype = DTYPES[x.dtype]
    lib.llmd_quantize_rows(
        quantized.data_ptr(), token_scale.data_ptr(), x.data_ptr(), None if x_scale is None else x_scale.data_ptr(),
        count, depth, x.stride(0), x_zero, dtype,
    )  # fmt: skip
    lib.llmd_int8_linear(
        out.data_ptr(), quantized.data_ptr(), token_scale.data_ptr(), weight.data_ptr(), scale.data_ptr(),
        row_sums.data_ptr(), None if bias is None else bias.data_ptr(), count, width, depth, x_zero, dtype,
    )  # fmt: skip
    return out
