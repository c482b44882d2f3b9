"""Write the keys and values of a step's tokens into their slots of the paged KV cache."""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.store_kv import cpu, reference


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Copy k, v [T, K, D] into kv [num_blocks, 2, block_size, K, D], a view of one layer with a strided first dim.

    slot_mapping: [T] int64, block · block_size + offset.
    """
    if native.is_available(k) and kv.dtype in native.DTYPES and k.stride(1) == v.stride(1) == k.shape[2]:
        cpu.store_kv(k, v, kv, slot_mapping)
    else:
        reference.store_kv(k, v, kv, slot_mapping)
