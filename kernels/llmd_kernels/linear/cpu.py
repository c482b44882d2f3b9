"""Launches llmd_linear."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """bfloat16 x [M, K], weight [N, K] and bias [N], rows may be strided → [M, N] bfloat16 or float32."""
    (num_rows, depth), width = x.shape, weight.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(num_rows, width, dtype=out_dtype)
    lib = library()
    assert lib is not None
    lib.llmd_linear(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(),
        num_rows, width, depth, x.stride(0), weight.stride(0), DTYPES[out_dtype],
    )  # fmt: skip
    return out
