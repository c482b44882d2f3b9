"""A KV cache in eight bits: int8 or float8 e4m3, with a scale for each token and head beside the block's data.

Scales are taken from the very token that is stored: nothing is calibrated, nothing saturates, and what a block holds does
not depend on what else was in its batch, so that a prefix hit equals a recomputation. Static scales, as some checkpoints
carry them, save the scales' three per cent of the bytes and add no accuracy: a float's precision does not depend on its
scale, and int8 wants the tightest there is. Errors of a unit-variance head of 64, rms: int8 0.006, e4m3 0.026.

    one layer of one block:  k data [token, head, dim] · k scales [token, head] · v data · v scales; each 16-byte aligned
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

LIMITS: dict[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest number of each
_ALIGNMENT = 16  # bytes: GPUs load so many at once
_ROUND_UP = 1 + 2**-8  # no bfloat16 of a scale times this is below the scale
_TINY = 1e-30  # heads with a scale below it are zero


class QuantizedKV(NamedTuple):
    """One layer's view of a quantized pool: a number is its data times its scale."""

    data: torch.Tensor  # [num_blocks, 2, block_size, K, D] int8 or float8_e4m3fn
    scales: torch.Tensor  # [num_blocks, 2, block_size, K] bfloat16

    @property
    def shape(self) -> torch.Size:
        """As of the plain cache that it stands for."""
        return self.data.shape


LayerKV = torch.Tensor | QuantizedKV  # what the kernels take for one layer's part of the pool


def half_bytes(kv_shape: tuple[int, ...]) -> int:
    """Bytes of one layer's keys, or values, of a block of `kv_shape` [2, block_size, K, D], scales included."""
    return _aligned(math.prod(kv_shape[1:])) + _aligned(2 * math.prod(kv_shape[1:-1]))


def view_quantized(raw: torch.Tensor, kv_shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedKV:
    """Cut one layer's bytes [num_blocks, 2, half_bytes] uint8, a view with a strided first dim, into data and scales."""
    num_data, start = math.prod(kv_shape[1:]), _aligned(math.prod(kv_shape[1:]))
    data = raw[..., :num_data].view(dtype).unflatten(-1, kv_shape[1:])
    scales = raw[..., start : start + 2 * math.prod(kv_shape[1:-1])].view(torch.bfloat16)
    return QuantizedKV(data, scales.unflatten(-1, kv_shape[1:-1]))


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] → data of its shape and scales [...] bfloat16. A NaN or infinity makes its whole head NaN."""
    wide, limit = x.float(), LIMITS[dtype]
    scale = (wide.abs().amax(-1) * (_ROUND_UP / limit) + (wide * 0).sum(-1)).to(torch.bfloat16)
    inverse = torch.where(scale > _TINY, 1 / scale.float(), 0.0)
    scaled = (wide * inverse.unsqueeze(-1)).clamp(-limit, limit)
    scaled = scaled.nan_to_num(0.0)  # the scale tells
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def dequantize(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Data [..., D] and scales [...] → float32 [..., D]."""
    return data.float() * scales.float().unsqueeze(-1)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
