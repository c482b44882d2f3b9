"""The layout that llmd_grouped_linear reads (a picture is in cpu.cpp), there and back, and its launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmd_kernels.native import DTYPES, library

PANEL = 16  # rows of W side by side
_QUADS = 4  # of a step of 16 features
_BLOCKS = (64, 32, 16)
_LARGEST_PADDING = 1 / 16
_ROWS_AT_ONCE = 512  # a multiple of PANEL


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
    q = F.pad(_pad_groups(q, group_size), (0, 0, 0, -q.shape[0] % PANEL))
    steps = q.view(q.shape[0] // PANEL, PANEL, -1, _QUADS, 4).permute(0, 2, 3, 1, 4)  # [panel, step, quad, row, feature]
    if bits == 4:
        steps = steps[:, :, 0::2] | (steps[:, :, 1::2] << 4)
    return steps.reshape(steps.shape[0], -1)


def _pad_groups(q: torch.Tensor, group_size: int) -> torch.Tensor:
    block = block_size(group_size)
    if group_size % block == 0:
        return F.pad(q, (0, -q.shape[1] % block))
    return torch.cat([F.pad(group, (0, -group.shape[1] % block)) for group in torch.split(q, group_size, dim=1)], dim=1)


def unpack(packed: torch.Tensor, bits: int, group_size: int, width: int, depth: int) -> torch.Tensor:
    """Back to uint8 [N, K]."""
    steps = packed.view(packed.shape[0], -1, _QUADS * bits // 8, PANEL, 4)
    if bits == 4:
        steps = torch.stack((steps & 15, steps >> 4), dim=3).flatten(2, 3)
    q = steps.permute(0, 3, 1, 2, 4).reshape(packed.shape[0] * PANEL, -1)[:width]
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


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    columns: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero: int,
    factor: float,
    width: int,
) -> torch.Tensor:
    """x [M, K] of a dtype the kernels know, bias [N] float32 → [M, N] in x's dtype."""
    if x.stride(1) != 1:
        x = x.contiguous()
    count, depth = x.shape
    block, blocks = block_size(group_size), num_blocks(depth, group_size)
    out = torch.empty(count, width, dtype=x.dtype)
    scratch = torch.empty(count * (blocks * (block + 8) + 4 * scale.shape[1]) + 192, dtype=torch.uint8)
    lib = library()
    assert lib is not None
    lib.llmd_grouped_linear(
        out.data_ptr(), x.data_ptr(), None if columns is None else columns.data_ptr(), packed.data_ptr(), scale.data_ptr(),
        None if offset is None else offset.data_ptr(), None if bias is None else bias.data_ptr(), scratch.data_ptr(),
        factor, count, width, depth, x.stride(0), bits, group_size, block, zero, DTYPES[x.dtype],
    )  # fmt: skip
    return out
