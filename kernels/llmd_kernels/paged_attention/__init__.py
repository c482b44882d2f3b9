"""Causal attention of a step's tokens over the paged KV cache: decode and chunked prefill are the same call."""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.paged_attention import cpu, reference


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """[T, H, D] in q's dtype, contiguous.

    q: [T, H, D], the heads dense. kv: [num_blocks, 2, block_size, K, D], one layer's view, keys and values of this step
    already stored. block_table: [max_rows, W] int32. rows: [R] int64, each scheduled row's line in it. query_start:
    [R+1] int32, where a row's tokens begin in q. seq_lens: [R] int32, tokens of the row this step's included.
    window: a token sees itself and so many less one before it.
    """
    if q.shape[1] % kv.shape[3] or q.shape[2] != kv.shape[4]:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache {tuple(kv.shape)}")
    if native.is_available(q) and kv.dtype in native.DTYPES and q.stride(1) == q.shape[2]:
        return cpu.paged_attention(q, kv, block_table, rows, query_start, seq_lens, scale, window)
    if q.is_cpu:
        return cpu.paged_attention_sdpa(q, kv, block_table, rows, query_start, seq_lens, scale, window)
    return reference.paged_attention(q, kv, block_table, rows, query_start, seq_lens, scale, window)
