"""The truth, in torch."""

from __future__ import annotations

import torch


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """k, v [T, K, D] → kv [num_blocks, 2, block_size, K, D] at slot_mapping [T]."""
    block_size = kv.shape[2]
    block = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offset = slot_mapping - block * block_size
    kv[block, 0, offset] = k.to(kv.dtype)
    kv[block, 1, offset] = v.to(kv.dtype)
