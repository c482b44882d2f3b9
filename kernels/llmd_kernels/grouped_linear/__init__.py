"""y = x · Wᵀ + b with weights of 4 or 8 bits that share a scale, and maybe an offset, by groups of input features.

    W[n, k] = q[n, k] · scale[n, g] + offset[n, g]        g = k // group_size,  0 ≤ q < 2^bits

Every integer format with scales by group is this: AWQ and GPTQ (offset = -zero · scale), GGUF's blocks (offset = -min),
compressed-tensors. `pack` brings it into the layout that the kernels of the device read; nothing else knows that layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmd_kernels.grouped_linear import reference


class GroupedWeight(NamedTuple):
    """W [N, K] packed. Made by `pack`; the tensors may be moved or registered as buffers, not looked into."""

    packed: torch.Tensor  # uint8 [N, bytes a row]
    scale: torch.Tensor  # [N, num_groups] float16
    offset: torch.Tensor | None  # [N, num_groups] float16; None: -zero · scale
    columns: torch.Tensor | None  # int32 [K]: input features in the order of the packed ones (GPTQ's act-order)
    bits: int
    group_size: int
    zero: int  # the q that stands for 0 where there is no offset
    in_features: int


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
    """Pack q [N, K] uint8 with scale and offset [N, ceil(K / group_size)].

    `columns` [K] says which input feature each column of q multiplies, where they are not in order. Raises ValueError for
    shapes or widths that do not go together.
    """
    num_groups = -(-q.shape[1] // group_size)
    if bits not in (4, 8) or q.dtype != torch.uint8 or q.dim() != 2:
        raise ValueError(f"pack wants bits 4 or 8 and q [N, K] uint8, got {bits}, {q.dtype} {tuple(q.shape)}")
    if scale.shape != (q.shape[0], num_groups) or (offset is not None and offset.shape != scale.shape):
        raise ValueError(f"pack wants scale and offset [{q.shape[0]}, {num_groups}], got {tuple(scale.shape)}")
    return GroupedWeight(
        reference.pack(q, bits), scale.to(torch.float16), None if offset is None else offset.to(torch.float16),
        None if columns is None else columns.to(torch.int32), bits, group_size, zero, q.shape[1],
    )  # fmt: skip


def unpack(weight: GroupedWeight) -> torch.Tensor:
    """[N, K] float32, columns in the order of the input features."""
    return reference.dequantize(
        weight.packed, weight.scale, weight.offset, weight.columns, weight.bits, weight.group_size, weight.zero,
        weight.in_features,
    )  # fmt: skip


def grouped_linear(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], bias [N] → [M, N] in x's dtype."""
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"grouped_linear wants x [M, {weight.in_features}], got {tuple(x.shape)}")
    return reference.linear(x, unpack(weight), bias)
