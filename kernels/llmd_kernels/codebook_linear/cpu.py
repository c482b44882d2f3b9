"""Launches llmd_codebook_linear."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library

_LANES = 16  # bytes of codes at a time
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
    halves = x.float().view(x.shape[0], -1, 2).transpose(1, 2).contiguous()  # [M, 2, K / 2]: even columns, odd ones
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype)
    wide_scale, wide_bias = scale.float(), None if bias is None else bias.float()
    lib = library()
    assert lib is not None
    lib.llmd_codebook_linear(
        out.data_ptr(), halves.data_ptr(), packed.data_ptr(), wide_scale.data_ptr(), codebook.data_ptr(),
        None if wide_bias is None else wide_bias.data_ptr(), x.shape[0], packed.shape[0], in_features // 2, group_size // 2,
        DTYPES[x.dtype],
    )  # fmt: skip
    return out
