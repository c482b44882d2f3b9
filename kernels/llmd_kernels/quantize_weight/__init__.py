"""Weights to 8 or 4 bits while a model loads, in one pass over memory on a CPU.

channels    w ≈ q · scale[n], |q| ≤ 127, the largest of a row at ±127
groups      w ≈ (q - 8) · scale[n, g], 0 ≤ q < 16, the scale of two that leaves the smaller squared error
"""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.quantize_weight import reference

GROUP_SIZES = (32, 64, 128)


def quantize_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, K] of any float dtype → int8 [N, K], float32 scales [N], and the int32 sums [N] of the int8 rows."""
    if not native.is_available(weight) or not weight.is_contiguous():
        return reference.quantize_channels(weight)
    quantized = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], dtype=torch.float32)
    row_sums = torch.empty(weight.shape[0], dtype=torch.int32)
    lib = native.library()
    assert lib is not None
    lib.llmd_quantize_channels(
        quantized.data_ptr(), scale.data_ptr(), row_sums.data_ptr(), weight.data_ptr(), *weight.shape,
        native.DTYPES[weight.dtype],
    )  # fmt: skip
    return quantized, scale, row_sums


def quantize_groups(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] of any float dtype → uint8 codes [N, K] and float16 scales [N, ceil(K / group_size)]; NaN where weights are."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"quantize_groups wants group_size of {GROUP_SIZES}, got {group_size}")
    if not native.is_available(weight) or not weight.is_contiguous():
        return reference.quantize_groups(weight, group_size)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scale = torch.empty(weight.shape[0], -(-weight.shape[1] // group_size), dtype=torch.float32)
    lib = native.library()
    assert lib is not None
    lib.llmd_quantize_groups(
        codes.data_ptr(), scale.data_ptr(), weight.data_ptr(), *weight.shape, group_size, native.DTYPES[weight.dtype]
    )
    return codes, scale.to(torch.float16)
