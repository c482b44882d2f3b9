"""The truth, in torch, and how activations and weights become e4m3."""

from __future__ import annotations

import torch

_TOP = 448.0  # the largest e4m3fn
_LEAST = torch.finfo(torch.float32).tiny
_ROWS_AT_ONCE = 256


def dequantize(weight: torch.Tensor, grid: torch.Tensor, height: int, columns: int) -> torch.Tensor:
    """float32 [N, K]."""
    width, depth = weight.shape
    by_row = grid.repeat_interleave(height, 0)[:width]
    return weight.float() * by_row.repeat_interleave(columns, 1)[:, :depth]


def quantize(
    x: torch.Tensor, columns: int, x_scale: torch.Tensor | None, num_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] as e4m3 values in x's dtype, which holds them exactly, and their float32 scales [M, num_blocks].

    One scale for each `columns` features of a token, or for all what `x_scale` says.
    """
    count, depth = x.shape
    wide = x.float()
    if x_scale is None:
        parts = torch.nn.functional.pad(wide, (0, -depth % columns)).view(count, -1, columns)
        scale = (parts.abs().amax(2) / _TOP).clamp_min_(_LEAST)
    else:
        scale = x_scale.float().reshape(1, 1).expand(count, 1)
    ratio = wide / scale.repeat_interleave(columns, 1)[:, :depth]
    small = ratio.clamp_(-_TOP, _TOP).to(torch.float8_e4m3fn)
    return small.to(x.dtype), scale.expand(count, num_blocks).contiguous()


def quantize_weight(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] → float8_e4m3fn [N, K] and float32 scales: [N] where a block is a row, else the grid."""
    height, columns = block
    width, depth = weight.shape
    stored = torch.empty(width, depth, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = []
    step = height * max(1, _ROWS_AT_ONCE // height)  # float32 copies of a few rows, not of the whole weight
    for start in range(0, width, step):
        part = weight[start : start + step].float()
        padded = torch.nn.functional.pad(part, (0, -depth % columns, 0, -part.shape[0] % height))
        blocks = padded.view(-1, height, padded.shape[1] // columns, columns)
        scale = (blocks.abs().amax((1, 3)) / _TOP).clamp_min_(_LEAST)
        ratio = blocks / scale[:, None, :, None]
        stored[start : start + step] = ratio.view(padded.shape)[: part.shape[0], :depth].to(torch.float8_e4m3fn)
        scales.append(scale)
    grid = torch.cat(scales)
    return stored, grid[:, 0].contiguous() if block == (1, depth) else grid


def linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    grid: torch.Tensor,
    height: int,
    columns: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K] with its scales by row and block, if any, → [M, N] in x's dtype; sums in float32."""
    wide = x.float()
    if x_scale is not None:
        wide = wide * x_scale.repeat_interleave(columns, 1)[:, : x.shape[1]]
    y = wide @ dequantize(weight, grid, height, columns).T
    return (y if bias is None else y + bias.float()).to(x.dtype)
