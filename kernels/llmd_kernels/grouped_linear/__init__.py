"""y = x · Wᵀ + b with weights of 4 or 8 bits that share a scale, and maybe an offset, by groups of input features.

    W[n, k] = q[n, k] · scale[n, g] + offset[n, g]        g = k // group_size,  0 ≤ q < 2^bits

Every integer format with scales by group is this: AWQ and GPTQ (offset = -zero · scale), GGUF's blocks (offset = -min),
compressed-tensors. `pack` brings it into the layout that the kernels of the device read; nothing else knows that layout.
On a CPU activations become 8-bit with a scale a token and block of at most 64 features, so that the product is VNNI's.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch

from llmd_kernels import native
from llmd_kernels.grouped_linear import cpu, reference

_LARGEST_HALF = 32768.0


class GroupedWeight(NamedTuple):
    """W [N, K] packed. Made by `pack`; the tensors may be moved or registered as buffers, not looked into."""

    packed: torch.Tensor  # uint8
    scale: torch.Tensor  # float16, of `factor`
    offset: torch.Tensor | None  # float16, of `factor`; None: -zero · scale
    columns: torch.Tensor | None  # int32 [K]: input features in the order of the packed ones (GPTQ's act-order)
    bits: int
    group_size: int
    zero: int  # the q that stands for 0 where there is no offset
    in_features: int
    out_features: int
    factor: float  # a power of two that keeps scale and offset within float16, whatever the checkpoint's dtype
    layout: str  # "panels" as cpu.cpp reads them, "chunks" as triton.py does


def pack(
    q: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    zero: int = 0,
    columns: torch.Tensor | None = None,
) -> GroupedWeight:
    """Pack q [N, K] uint8 with scale and offset [N, ceil(K / group_size)] for the device that q is on.

    `columns` [K] says which input feature each column of q multiplies, where they are not in order. Raises ValueError for
    shapes or widths that do not go together.
    """
    _check(q, scale, offset, bits, group_size, zero, columns)
    width, depth = q.shape
    group_size = min(group_size, depth)
    factor = _factor(scale, offset)
    small = (scale.float() / factor).to(torch.float16)
    small_offset = None if offset is None else (offset.float() / factor).to(torch.float16)
    order = None if columns is None else columns.to(torch.int32).contiguous()
    if q.is_cuda:
        packed, layout = _on_gpu().pack(q, bits), "chunks"
        small = small.T.contiguous()
        small_offset = None if small_offset is None else small_offset.T.contiguous()
    else:
        packed, layout = cpu.pack(q, bits, group_size), "panels"
        small = cpu.pack_scales(small)
        small_offset = None if small_offset is None else cpu.pack_scales(small_offset)
    return GroupedWeight(packed, small, small_offset, order, bits, group_size, zero, depth, width, factor, layout)


def _check(
    q: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero: int,
    columns: torch.Tensor | None,
) -> None:
    if bits not in (4, 8) or q.dtype != torch.uint8 or q.dim() != 2 or 0 in q.shape:
        raise ValueError(f"pack wants bits 4 or 8 and q [N, K] uint8, got {bits}, {q.dtype} {tuple(q.shape)}")
    if group_size < 1 or not 0 <= zero < 1 << bits:
        raise ValueError(f"pack wants group_size > 0 and 0 <= zero < {1 << bits}, got {group_size}, {zero}")
    shape = (q.shape[0], -(-q.shape[1] // group_size))
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"pack wants {name} {list(shape)}, got {list(tensor.shape)}")
    if columns is not None and columns.shape != (q.shape[1],):
        raise ValueError(f"pack wants columns [{q.shape[1]}], got {list(columns.shape)}")


def _factor(scale: torch.Tensor, offset: torch.Tensor | None) -> float:
    """The power of two that brings the largest scale or offset just under float16's largest value."""
    tensors = (scale,) if offset is None else (scale, offset)
    top = max(float(tensor.abs().max()) for tensor in tensors)
    return 2.0 ** math.ceil(math.log2(top / _LARGEST_HALF)) if 0 < top < math.inf else 1.0


def unpack(weight: GroupedWeight) -> torch.Tensor:
    """[N, K] float32, columns in the order of the input features."""
    scale, offset = weight.scale, weight.offset
    if weight.layout == "panels":
        q = cpu.unpack(weight.packed, weight.bits, weight.group_size, weight.out_features, weight.in_features)
        scale = cpu.unpack_scales(scale, weight.out_features)
        offset = None if offset is None else cpu.unpack_scales(offset, weight.out_features)
    else:
        q = _on_gpu().unpack(weight.packed, weight.bits, weight.in_features)
        scale, offset = scale.T, None if offset is None else offset.T
    dense = reference.dequantize(q, scale, offset, weight.columns, weight.group_size, weight.zero)
    return dense.mul_(weight.factor)


def grouped_linear(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], bias [N] → [M, N] in x's dtype."""
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"grouped_linear wants x [M, {weight.in_features}], got {tuple(x.shape)}")
    if weight.layout == "panels" and native.is_available(x):
        return cpu.linear(x, weight, bias)
    if weight.layout == "chunks" and x.is_cuda:
        return _on_gpu().linear(x, weight, bias)
    return reference.linear(x, unpack(weight), bias)


def _on_gpu() -> ModuleType:
    """Triton is imported only where there is a GPU."""
    from llmd_kernels.grouped_linear import triton

    return triton
