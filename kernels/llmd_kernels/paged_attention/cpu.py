"""Launches llmd_paged_attention; beside it a torch path for machines without a compiler."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmd_kernels.native import DTYPES, library
from llmd_kernels.paged_attention.reference import gather, visible


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
    """As in the package; float32 accumulation."""
    lib = library()
    assert lib is not None
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype)
    keys = kv.data_ptr()
    values = keys + kv.stride(1) * kv.element_size()
    lib.llmd_paged_attention(
        out.data_ptr(), q.data_ptr(), keys, values, block_table.data_ptr(), rows.data_ptr(), query_start.data_ptr(),
        seq_lens.data_ptr(), scale, rows.shape[0], num_tokens, num_heads, kv.shape[3], head_dim, kv.shape[2],
        block_table.stride(0), q.stride(0), kv.stride(0), kv.stride(2), kv.stride(3), window or 0, DTYPES[q.dtype],
        DTYPES[kv.dtype], 0,
    )  # fmt: skip
    return out


def paged_attention_sdpa(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """As in the package, by torch: the GQA group is folded into the query length, five times faster than enable_gqa."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    bounds = query_start.tolist()
    for index, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        span = slice(bounds[index], bounds[index + 1])
        keys, values = gather(kv, block_table[row], length)
        out[span] = _attend_folded(q[span], keys.to(q.dtype), values.to(q.dtype), scale, window)
    return out


def _attend_folded(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    num_queries, num_heads, head_dim = q.shape
    length, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    folded = q.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
    mask = None
    if num_queries > 1 or window is not None:
        mask = visible(num_queries, length, window, q.device).repeat(group, 1)
    mixed = F.scaled_dot_product_attention(
        folded.unsqueeze(0), keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0), mask, scale=scale
    )
    return mixed.view(num_kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3).reshape(q.shape)
