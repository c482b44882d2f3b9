"""y = x · Wᵀ + b with weights of 4 bits that name one of 16 values, scaled by groups of input features.

    W[n, k] = codebook[q[n, k]] · scale[n, g]        g = k // group_size

NF4 and FP4 are this: values that lie where a normal distribution has them, or a float's, which no scale and offset can give.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmd_kernels import native
from llmd_kernels.codebook_linear import cpu, reference


class CodebookWeight(NamedTuple):
    """W [N, K] packed. Made by `pack`; the tensors may be moved or registered as buffers, not looked into."""

    packed: torch.Tensor  # uint8 [N, ceil(K / 2)]: an even column in the low half of a byte
    scale: torch.Tensor  # [N, num_groups], any float dtype
    codebook: torch.Tensor  # float32 [16]
    group_size: int
    in_features: int


def pack(q: torch.Tensor, scale: torch.Tensor, codebook: torch.Tensor, *, group_size: int) -> CodebookWeight:
    """Pack q [N, K] uint8 below 16, with scale [N, ceil(K / group_size)]. Raises ValueError for shapes that do not agree."""
    if q.dtype != torch.uint8 or q.dim() != 2 or codebook.shape != (16,):
        raise ValueError(f"pack wants q [N, K] uint8 and 16 values, got {q.dtype} {tuple(q.shape)}, {tuple(codebook.shape)}")
    if scale.shape != (q.shape[0], -(-q.shape[1] // group_size)):
        raise ValueError(f"pack wants scale [{q.shape[0]}, {-(-q.shape[1] // group_size)}], got {tuple(scale.shape)}")
    return CodebookWeight(reference.pack(q), scale, codebook.float(), group_size, q.shape[1])


def unpack(weight: CodebookWeight) -> torch.Tensor:
    """[N, K] float32."""
    return reference.dequantize(*weight, torch.float32)


def codebook_linear(x: torch.Tensor, weight: CodebookWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], bias [N] → [M, N] in x's dtype."""
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"codebook_linear wants x [M, {weight.in_features}], got {tuple(x.shape)}")
    if x.shape[0] <= cpu.MAX_ROWS and cpu.fits(weight.group_size, weight.in_features) and native.is_available(x):
        return cpu.linear(x, *weight, bias)
    return reference.linear(x, *weight, bias)
