"""The truth, in torch."""

from __future__ import annotations

import torch

from llmd_kernels.quantized_kv import QuantizedKV, quantize


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor | QuantizedKV, slot_mapping: torch.Tensor) -> None:
    """k, v [T, K, D] → kv [num_blocks, 2, block_size, K, D] at slot_mapping [T]."""
    block_size = kv.shape[2]
    block = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offset = slot_mapping - block * block_size
    for half, x in enumerate((k, v)):
        if isinstance(kv, QuantizedKV):
            data, scales = quantize(x, kv.data.dtype)
            kv.data.view(torch.int8)[block, half, offset] = data.view(torch.int8)
            kv.scales[block, half, offset] = scales
        else:
            kv[block, half, offset] = x.to(kv.dtype)
