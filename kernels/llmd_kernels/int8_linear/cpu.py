"""The layout that cpu.cpp reads, there and back, and the launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from llmd_kernels import panels
from llmd_kernels.native import DTYPES, library

if TYPE_CHECKING:
    from llmd_kernels.int8_linear import Int8Weight

_LINE = 64  # bytes; rows of quantized activations begin in lines of their own, an odd number apart
_ROWS = 8  # of x, that a tile may reach


def packed_shape(width: int, depth: int) -> tuple[int, int]:
    """Of the uint8 tensor that [N, K] becomes: panels, bytes of one."""
    return -(-width // panels.PANEL), panels.PANEL * -(-depth // panels.STEP) * panels.STEP


def pack(packed: torch.Tensor, start: int, quantized: torch.Tensor) -> None:
    """Put int8 rows [n, K] into panels, from row `start` on; it begins a panel."""
    codes = F.pad(quantized.view(torch.uint8) ^ 128, (0, -quantized.shape[1] % panels.STEP))
    some = panels.quads(codes)
    packed[start // panels.PANEL :][: len(some)] = some.view(len(some), -1)


def unpack(packed: torch.Tensor, width: int, depth: int) -> torch.Tensor:
    """Back to int8 [N, K]."""
    codes = panels.rows(packed.view(len(packed), -1, panels.PANEL, panels.QUAD))[:width, :depth]
    return (codes ^ 128).view(torch.int8)


def unpack_rows(packed: torch.Tensor, ids: torch.Tensor, depth: int) -> torch.Tensor:
    """int8 [..., K]."""
    places = packed.view(len(packed), -1, panels.PANEL, panels.QUAD)
    codes = places[ids // panels.PANEL, :, ids % panels.PANEL].flatten(-2)[..., :depth]
    return (codes ^ 128).view(torch.int8)


def int8_linear(
    x: torch.Tensor,
    weight: Int8Weight,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    x_zero: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """x [M, K] of a dtype the kernels know, x_scale one float32 or None → [M, N]."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None and bias.dtype not in DTYPES:
        bias = bias.float()
    (count, depth), width = x.shape, len(weight.scale)
    scratch = torch.empty((count + _ROWS) * (depth + 2 * _LINE) + 8 * count, dtype=torch.uint8)
    out = torch.empty(count, width, dtype=out_dtype)
    lib = library()
    assert lib is not None
    lib.llmd_int8_linear(
        out.data_ptr(), x.data_ptr(), None if x_scale is None else x_scale.data_ptr(), weight.packed.data_ptr(),
        weight.scale.data_ptr(), weight.row_sums.data_ptr(), None if bias is None else bias.data_ptr(), scratch.data_ptr(),
        count, width, depth, x.stride(0), x_zero, DTYPES[x.dtype], DTYPES[out_dtype],
        DTYPES[torch.float32 if bias is None else bias.dtype],
    )  # fmt: skip
    return out


def rows(weight: Int8Weight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """ids [...] int64, contiguous → [..., K]."""
    out = torch.empty(*ids.shape, weight.in_features, dtype=dtype)
    lib = library()
    assert lib is not None
    lib.llmd_int8_rows(
        out.data_ptr(), ids.data_ptr(), weight.packed.data_ptr(), weight.scale.data_ptr(), ids.numel(), len(weight.scale),
        weight.in_features, DTYPES[dtype],
    )  # fmt: skip
    return out
