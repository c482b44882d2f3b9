"""Launches llmd_store_kv and llmd_rotary_store_kv."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, KV_DTYPES, library
from llmd_kernels.quantized_kv import QuantizedKV


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor | QuantizedKV, slot_mapping: torch.Tensor) -> None:
    """k, v [T, K, D] with dense heads; rows may be strided."""
    lib = library()
    assert lib is not None
    data, scales = kv if isinstance(kv, QuantizedKV) else (kv, None)
    lib.llmd_store_kv(
        k.data_ptr(), v.data_ptr(), *halves(data), *halves(scales), slot_mapping.data_ptr(), k.shape[0], k.shape[1],
        k.shape[2], data.shape[2], k.stride(0), v.stride(0), data.stride(0), 0 if scales is None else scales.stride(0),
        DTYPES[k.dtype], KV_DTYPES[data.dtype],
    )  # fmt: skip


def rotary_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor | QuantizedKV,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """As in the package, of dense heads: q and k are normalised and turned in place."""
    lib = library()
    assert lib is not None
    data, scales = kv if isinstance(kv, QuantizedKV) else (kv, None)
    weights = (None, None, 0.0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr(), norms[2])
    lib.llmd_rotary_store_kv(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *halves(data), *halves(scales), positions.data_ptr(),
        slot_mapping.data_ptr(), cos_sin.data_ptr(), *weights, *q.shape[:2], k.shape[1], k.shape[2], cos_sin.shape[1],
        cos_sin.shape[0], data.shape[2], q.stride(0), k.stride(0), v.stride(0), data.stride(0),
        0 if scales is None else scales.stride(0), DTYPES[k.dtype], KV_DTYPES[data.dtype],
    )  # fmt: skip


def halves(cache: torch.Tensor | None) -> tuple[int | None, int | None]:
    """Where the keys of [num_blocks, 2, ...] begin in memory, and where the values."""
    if cache is None:
        return None, None
    return cache.data_ptr(), cache.data_ptr() + cache.stride(1) * cache.element_size()
