"""Write the keys and values of a step's tokens into their slots of the paged KV cache, alone or with what comes before."""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.quantized_kv import LayerKV, QuantizedKV
from llmd_kernels.rms_norm import rms_norm
from llmd_kernels.rotary import rotary
from llmd_kernels.store_kv import cpu, reference


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: LayerKV, slot_mapping: torch.Tensor) -> None:
    """Copy k, v [T, K, D] into kv [num_blocks, 2, block_size, K, D], a view of one layer with a strided first dim.

    slot_mapping: [T] int64, block · block_size + offset. A QuantizedKV gets a scale for each token and head.
    """
    if k.shape != v.shape or k.shape[1:] != kv.shape[3:]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a cache {tuple(kv.shape)}")
    if k.is_cuda:
        from llmd_kernels.store_kv import triton

        triton.store_kv(k, v, kv, slot_mapping)
    elif _is_native(kv, k, v):
        cpu.store_kv(k, v, kv, slot_mapping)
    else:
        reference.store_kv(k, v, kv, slot_mapping)


def rotary_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: LayerKV,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """Turn q [T, H, D] in place and k [T, K, D] (see rotary), then store k and v: one launch.

    norms: weights [D] of q's and k's heads and eps, where heads are normalised first. k may be overwritten or not.
    """
    if k.shape != v.shape or k.shape[1:] != kv.shape[3:] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit a cache {tuple(kv.shape)}")
    if q.is_cuda:
        from llmd_kernels.store_kv import triton

        triton.rotary_store_kv(q, k, v, kv, positions, slot_mapping, cos_sin, norms)
        return
    if _is_native(kv, q, k, v):
        cpu.rotary_store_kv(q, k, v, kv, positions, slot_mapping, cos_sin, norms)
        return
    if norms is not None:
        q.copy_(rms_norm(q, norms[0], norms[2]))
        k.copy_(rms_norm(k, norms[1], norms[2]))
    rotary(q, k, positions, cos_sin)
    store_kv(k, v, kv, slot_mapping)


def _is_native(kv: LayerKV, *heads: torch.Tensor) -> bool:
    """Whether the compiled kernels can do it: a dtype they know for all, numbers and heads dense, rows maybe strided."""
    first, dtype = heads[0], kv.data.dtype if isinstance(kv, QuantizedKV) else kv.dtype
    is_dense = all(x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.dtype == first.dtype for x in heads)
    return is_dense and dtype in native.KV_DTYPES and native.is_available(first)
