"""Blocks of GGUF's quantized types, taken apart into codes, scales and offsets: W = (code - zero) · scale + offset.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0 … block_q6_K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """How a type's weights are coded; `split(blocks [B, bytes])` → codes [B, weights], scales and offsets [B, groups]."""

    bits: int  # 4 or 8, of the codes as they are kept
    group_size: int
    zero: int
    has_offset: bool
    split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block, [B, 1] float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[B, n] → [B, 2n]: all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _high_bits(packed: Tensor) -> Tensor:
    """[B, 4] → [B, 32]: bit i of the 32 as 16 or 0."""
    shift = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(2) >> shift) & 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _nibbles(blocks[:, 6:]) | _high_bits(blocks[:, 2:6]), _half(blocks, 0), None


def _q5_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _nibbles(blocks[:, 8:]) | _high_bits(blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return blocks[:, 2:] ^ 128, _half(blocks, 0), None  # from two's complement to 0 … 255


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes: eight 6-bit scales and eight 6-bit minima; the upper halves' top bits are the lower ones' spare bits."""
    low_scale, low_min, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat((low_scale & 63, (high & 15) | ((low_scale >> 6) << 4)), dim=1)
    minimum = torch.cat((low_min & 63, (high >> 4) | ((low_min >> 6) << 4)), dim=1)
    return scale.float(), minimum.float()


def _in_pairs(packed: Tensor) -> Tensor:
    """[B, 128] → [B, 256]: of each 32 bytes the low halves, then the high ones."""
    chunks = packed.view(-1, 4, 1, 32)
    return torch.cat((chunks & 15, chunks >> 4), dim=2).flatten(1)


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    scale, minimum = _scales_and_mins(blocks[:, 4:16])
    return _in_pairs(blocks[:, 16:].contiguous()), _half(blocks, 0) * scale, -_half(blocks, 2) * minimum


def _q5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    scale, minimum = _scales_and_mins(blocks[:, 4:16])
    shift = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    high = ((blocks[:, 16:48].unsqueeze(1) >> shift) & 1).flatten(1) << 4  # bit i of byte j: weight 32 i + j
    return _in_pairs(blocks[:, 48:].contiguous()) | high, _half(blocks, 0) * scale, -_half(blocks, 2) * minimum


def _q6_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    low = blocks[:, :128].contiguous().view(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), dim=2).flatten(1)
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    high = ((blocks[:, 128:192].contiguous().view(-1, 2, 1, 32) >> shift) & 3).flatten(1) << 4
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return low | high, scale * _half(blocks, 208), None


KINDS = {
    "Q4_0": Kind(4, 32, 8, False, _q4_0),
    "Q4_1": Kind(4, 32, 0, True, _q4_1),
    "Q5_0": Kind(8, 32, 16, False, _q5_0),
    "Q5_1": Kind(8, 32, 0, True, _q5_1),
    "Q8_0": Kind(8, 32, 128, False, _q8_0),
    "Q4_K": Kind(4, 32, 0, True, _q4_k),
    "Q5_K": Kind(8, 32, 0, True, _q5_k),
    "Q6_K": Kind(8, 16, 32, False, _q6_k),
}


def dequantize(kind: Kind, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """float32 [R, K] of codes [R, K], scale and offset [R, K / group_size]."""
    groups = (codes.float() - kind.zero).view(*scale.shape, kind.group_size) * scale.unsqueeze(2)
    return (groups if offset is None else groups + offset.unsqueeze(2)).flatten(1)
