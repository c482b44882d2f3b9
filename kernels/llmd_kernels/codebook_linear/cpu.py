"""Launches llmd_codebook_linear."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library

_LANES = 16  # bytes of codes at a time
_DTYPES = {**DTYPES, torch.float16: 2}  # of scales and biases
MAX_ROWS = 192  # beyond, a dense panel that all rows share wins


def fits(group_size: int, in_features: int) -> bool:
    """Whether groups are whole, and of whole steps of the kernel."""
    return in_features % group_size == 0 and group_size % (2 * _LANES) == 0


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    codebook: torch.Tensor,
    group_size: int,
    in_features: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K] of a dtype the kernels know → [M, N] in x's dtype."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if scale.dtype not in _DTYPES:
        scale = scale.float()
    if bias is not None and bias.dtype not in _DTYPES:
        bias = bias.float()
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype)
    lib = library()
    assert lib is not None
    lib.llmd_codebook_linear(
        out.data_ptr(), x.data_ptr(), packed.data_ptr(), scale.data_ptr(), codebook.data_ptr(),
        None if bias is None else bias.data_ptr(), x.shape[0], packed.shape[0], in_features // 2, group_size // 2,
        x.stride(0), DTYPES[x.dtype], _DTYPES[scale.dtype], _DTYPES[torch.float32 if bias is None else bias.dtype],
    )  # fmt: skip
    return out
