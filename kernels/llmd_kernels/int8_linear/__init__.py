"""y = x · Wᵀ + b with 8-bit weights, scaled by output channel, and 8-bit activations, scaled by token.

A token's scale depends on that token alone, and integers add up exactly, so a row's result is the same in every batch.
On a CPU W lies in panels (a picture is in panels.h), elsewhere row by row; `pack` decides, nothing else needs to know.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmd_kernels import native
from llmd_kernels.int8_linear import cpu, reference
from llmd_kernels.quantize_weight import quantize_channels

_ROWS_AT_ONCE = 256  # a multiple of a panel's
_MAX_DEPTH = 1 << 16  # 255 · 127 · depth must fit 32 bits


class Int8Weight(NamedTuple):
    """W [N, K] packed. Made by `pack` or `quantize`; its tensors may be moved or kept on disk, not looked into."""

    packed: torch.Tensor  # uint8 panels, or int8 [N, K]
    scale: torch.Tensor  # float32 [N]
    row_sums: torch.Tensor  # int32 [N], of the 8-bit rows
    in_features: int

    @property
    def is_in_panels(self) -> bool:
        """Whether it lies as cpu.cpp reads it."""
        return self.packed.dtype == torch.uint8


def int8_linear(
    x: torch.Tensor,
    weight: Int8Weight,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    x_zero: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [M, K], bias [N] → [M, N] in `out_dtype`, by default x's.

    x_scale: one float32 for all tokens instead of each one's own; x / x_scale + x_zero is rounded and cut to -128 … 127.
    """
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"int8_linear wants x [M, {weight.in_features}], got {tuple(x.shape)}")
    if x_scale is None and x_zero:
        raise ValueError(f"int8_linear wants x_zero only with x_scale, got {x_zero}")
    if not -128 <= x_zero <= 127:
        raise ValueError(f"int8_linear wants x_zero from -128 to 127, got {x_zero}")
    out_dtype = out_dtype or x.dtype
    if weight.is_in_panels and native.is_available(x) and out_dtype in native.DTYPES:
        return cpu.int8_linear(x, weight, bias, x_scale, x_zero, out_dtype)
    if x.is_cuda:
        from llmd_kernels.int8_linear import triton

        return triton.int8_linear(x, *weight[:3], bias, x_scale, x_zero, out_dtype)
    return reference.int8_linear(x, unpack(weight), weight.scale, bias, x_scale, x_zero, out_dtype)


def quantize(weight: torch.Tensor) -> Int8Weight:
    """[N, K] of any float dtype, each row's largest value to ±127."""
    packed = _empty(weight.shape, weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    row_sums = torch.empty(weight.shape[0], dtype=torch.int32, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):  # float32 copies of a few rows, not of the whole weight
        part = slice(start, start + _ROWS_AT_ONCE)
        quantized, scale[part], row_sums[part] = quantize_channels(weight[part])
        _put(packed, start, quantized)
    return Int8Weight(packed, scale, row_sums, weight.shape[1])


def pack(quantized: torch.Tensor, scale: torch.Tensor) -> Int8Weight:
    """W = quantized [N, K] int8 · scale [N]. Raises ValueError for shapes or dtypes that do not go together."""
    if quantized.dtype != torch.int8 or quantized.dim() != 2 or scale.shape != quantized.shape[:1]:
        raise ValueError(
            f"pack wants int8 [N, K] and scale [N], got {quantized.dtype} {tuple(quantized.shape)}, {tuple(scale.shape)}"
        )
    packed = _empty(quantized.shape, quantized.device)
    row_sums = torch.empty(scale.shape, dtype=torch.int32, device=scale.device)
    for start in range(0, len(quantized), _ROWS_AT_ONCE):
        part = quantized[start : start + _ROWS_AT_ONCE]
        row_sums[start : start + _ROWS_AT_ONCE] = part.sum(1, dtype=torch.int32)
        _put(packed, start, part)
    return Int8Weight(packed, scale.float(), row_sums, quantized.shape[1])


def unpack(weight: Int8Weight) -> torch.Tensor:
    """int8 [N, K]."""
    if not weight.is_in_panels:
        return weight.packed
    return cpu.unpack(weight.packed, len(weight.scale), weight.in_features)


def dequantize(weight: Int8Weight) -> torch.Tensor:
    """float32 [N, K]."""
    return unpack(weight).float() * weight.scale.unsqueeze(1)


def rows(weight: Int8Weight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of W by ids [...] int64 → [..., K] in `dtype`; an id outside reads the nearest row."""
    if weight.is_in_panels and dtype in native.DTYPES and ids.dtype == torch.int64 and native.library() is not None:
        return cpu.rows(weight, ids.contiguous(), dtype)
    ids = ids.clamp(0, len(weight.scale) - 1)
    picked = cpu.unpack_rows(weight.packed, ids, weight.in_features) if weight.is_in_panels else weight.packed[ids]
    return (picked.float() * weight.scale[ids].unsqueeze(-1)).to(dtype)


def _empty(shape: torch.Size, device: torch.device) -> torch.Tensor:
    if device.type == "cpu" and native.library() is not None and shape[1] <= _MAX_DEPTH:
        return torch.empty(cpu.packed_shape(*shape), dtype=torch.uint8)
    return torch.empty(shape, dtype=torch.int8, device=device)


def _put(packed: torch.Tensor, start: int, quantized: torch.Tensor) -> None:
    if packed.dtype == torch.int8:
        packed[start : start + len(quantized)] = quantized
    else:
        cpu.pack(packed, start, quantized)
