"""Launches llmd_store_kv."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """k, v [T, K, D] with dense heads; rows may be strided."""
    lib = library()
    assert lib is not None
    width = k.shape[1] * k.shape[2]
    lib.llmd_store_kv(
        k.data_ptr(), v.data_ptr(), kv[0, 0].data_ptr(), kv[0, 1].data_ptr(), slot_mapping.data_ptr(),
        k.shape[0], width, kv.shape[2], k.stride(0), v.stride(0), kv.stride(0), DTYPES[k.dtype], DTYPES[kv.dtype],
    )  # fmt: skip
