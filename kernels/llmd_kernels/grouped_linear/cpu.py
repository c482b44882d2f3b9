"""The layout that llmd_grouped_linear reads (a picture is in cpu.cpp), there and back, and its launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from llmd_kernels import panels
from llmd_kernels.native import DTYPES, library
from llmd_kernels.panels import PANEL

if TYPE_CHECKING:
    from llmd_kernels.grouped_linear import GroupedWeight

_BLOCKS = (64, 32, 16)
_LARGEST_PADDING = 1 / 16
_ROWS_AT_ONCE = 512  # a multiple of PANEL
_LINE = 64  # bytes; rows of quantized activations begin in lines of their own, an odd number apart
_ROWS = 8  # of x, that a tile may reach


def block_size(group_size: int) -> int:
    """How many features share a scale of the activations: the most that fill a group with little padding."""
    return next((size for size in _BLOCKS if -group_size % size <= group_size * _LARGEST_PADDING), _BLOCKS[-1])


def num_blocks(depth: int, group_size: int) -> int:
    """Of a row; each group begins a new one."""
    block, num_groups = block_size(group_size), -(-depth // group_size)
    last = depth - (num_groups - 1) * group_size
    return (num_groups - 1) * -(-group_size // block) + -(-last // block)


def pack(q: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """uint8 [N, K] → uint8 [panels of 16 rows, bytes a panel]."""
    width, depth = q.shape
    row_bytes = num_blocks(depth, group_size) * block_size(group_size) * bits // 8
    packed = torch.empty(-(-width // PANEL), PANEL * row_bytes, dtype=torch.uint8, device=q.device)
    for start in range(0, width, _ROWS_AT_ONCE):  # the copies on the way are of some rows, not of all
        some = _pack_rows(q[start : start + _ROWS_AT_ONCE], bits, group_size)
        packed[start // PANEL : start // PANEL + some.shape[0]] = some
    return packed


def _pack_rows(q: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    quads = panels.quads(_pad_groups(q, group_size))
    if bits == 4:
        quads = quads[:, 0::2] | (quads[:, 1::2] << 4)
    return quads.reshape(quads.shape[0], -1)


def _pad_groups(q: torch.Tensor, group_size: int) -> torch.Tensor:
    block = block_size(group_size)
    if group_size % block == 0:
        return F.pad(q, (0, -q.shape[1] % block))
    return torch.cat([F.pad(group, (0, -group.shape[1] % block)) for group in torch.split(q, group_size, dim=1)], dim=1)


def unpack(packed: torch.Tensor, bits: int, group_size: int, width: int, depth: int) -> torch.Tensor:
    """Back to uint8 [N, K]."""
    quads = packed.view(packed.shape[0], -1, PANEL, panels.QUAD)
    if bits == 4:
        quads = torch.stack((quads & 15, quads >> 4), dim=2).flatten(1, 2)
    q = panels.rows(quads)[:width]
    block = block_size(group_size)
    column = torch.arange(depth, device=packed.device)
    return q[:, column // group_size * (-(-group_size // block) * block) + column % group_size]


def pack_scales(scale: torch.Tensor) -> torch.Tensor:
    """[N, groups] → [panels, groups, 16]."""
    padded = F.pad(scale, (0, 0, 0, -scale.shape[0] % PANEL))
    return padded.view(-1, PANEL, scale.shape[1]).transpose(1, 2).contiguous()


def unpack_scales(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Back to [N, groups]."""
    return scale.transpose(1, 2).reshape(-1, scale.shape[1])[:width]


def linear(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] of a dtype the kernels know, bias [N] → [M, N] in x's dtype."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None and bias.dtype not in DTYPES:
        bias = bias.float()
    (count, depth), width = x.shape, weight.out_features
    block, blocks = block_size(weight.group_size), num_blocks(depth, weight.group_size)
    out = torch.empty(count, width, dtype=x.dtype)
    row_bytes = blocks * (block + 8) + 4 * weight.scale.shape[1] + 2 * _LINE
    scratch = torch.empty((count + _ROWS) * row_bytes, dtype=torch.uint8)
    lib = library()
    assert lib is not None
    lib.llmd_grouped_linear(
        out.data_ptr(), x.data_ptr(), None if weight.columns is None else weight.columns.data_ptr(),
        weight.packed.data_ptr(), weight.scale.data_ptr(), None if weight.offset is None else weight.offset.data_ptr(),
        None if bias is None else bias.data_ptr(), scratch.data_ptr(), weight.factor, count, width, depth, x.stride(0),
        weight.bits, weight.group_size, block, weight.zero, DTYPES[x.dtype],
        DTYPES[torch.float32 if bias is None else bias.dtype],
    )  # fmt: skip
    return out
