"""Launches llmd_lora."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch

from llmd_kernels.native import DTYPES, library

if TYPE_CHECKING:
    from llmd_kernels.lora import LoraRows, LoraWeights


def add_lora(y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> torch.Tensor:
    """y [T, out] with dense rows, float32 or bfloat16; x [T, in] in the weights' dtype."""
    if x.stride(1) != 1:
        x = x.contiguous()
    a, b, ranks, part_starts = weights
    num_slots, num_parts, max_rank, depth = a.shape
    num_tokens = rows.tokens.shape[0]
    hidden = torch.empty(num_tokens * num_parts * max_rank, dtype=torch.float32)
    lib = library()
    assert lib is not None
    lib.llmd_lora(
        y.data_ptr(), x.data_ptr(), a.data_ptr(), b.data_ptr(), ranks.data_ptr(), rows.tokens.data_ptr(),
        rows.starts.data_ptr(), _int64s(part_starts), hidden.data_ptr(), num_slots, num_parts, max_rank, depth, y.shape[1],
        x.stride(0), y.stride(0), DTYPES[a.dtype], DTYPES[y.dtype],
    )  # fmt: skip
    return y


@functools.lru_cache(maxsize=64)
def _int64s(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
