"""Causal attention of a step's tokens over the paged KV cache: decode and chunked prefill are the same call."""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.paged_attention import cpu, reference
from llmd_kernels.paged_attention.call import AttentionCall

__all__ = ["AttentionCall", "paged_attention"]

_MAX_NATIVE_GROUP = 128  # query heads a KV head


def paged_attention(call: AttentionCall) -> torch.Tensor:
    """[T, H, D] in q's dtype, contiguous. Raises ValueError for what does not fit together."""
    call.check()
    q = call.q
    if q.is_cuda:
        from llmd_kernels.paged_attention import triton

        return triton.paged_attention(call)
    if native.is_available(q) and _is_native(call):
        return cpu.paged_attention(call)
    is_plain = call.soft_cap is None and call.sinks is None and call.alibi_slopes is None
    return cpu.paged_attention_sdpa(call) if q.is_cpu and is_plain else reference.paged_attention(call)


def _is_native(call: AttentionCall) -> bool:
    q, data = call.q, call.kv if isinstance(call.kv, torch.Tensor) else call.kv.data
    fits = q.shape[1] // data.shape[3] <= _MAX_NATIVE_GROUP and q.stride(1) == q.shape[2] and q.stride(2) == 1
    return fits and data.dtype in native.KV_DTYPES
