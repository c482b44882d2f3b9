"""Launches llmd_paged_attention; beside it a torch path for machines without a compiler."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmd_kernels.native import DTYPES, KV_DTYPES, library
from llmd_kernels.paged_attention.call import AttentionCall
from llmd_kernels.paged_attention.reference import gather, visible
from llmd_kernels.quantized_kv import QuantizedKV
from llmd_kernels.store_kv.cpu import halves


def paged_attention(call: AttentionCall) -> torch.Tensor:
    """As in the package; float32 accumulation."""
    lib = library()
    assert lib is not None
    q, table = call.q, call.block_table
    data, scales = call.kv if isinstance(call.kv, QuantizedKV) else (call.kv, None)
    out = torch.empty(q.shape, dtype=q.dtype)
    lib.llmd_paged_attention(
        out.data_ptr(), q.data_ptr(), *halves(data), *halves(scales), table.data_ptr(), call.rows.data_ptr(),
        call.query_start.data_ptr(), call.seq_lens.data_ptr(), _address(call.sinks), _address(call.alibi_slopes),
        call.scale, call.soft_cap or 0.0, call.rows.shape[0], *q.shape[:2], data.shape[3], q.shape[2], data.shape[2],
        table.stride(0), q.stride(0), data.stride(0), data.stride(2), 0 if scales is None else scales.stride(0),
        call.window or 0, DTYPES[q.dtype], KV_DTYPES[data.dtype],
    )  # fmt: skip
    return out


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def paged_attention_sdpa(call: AttentionCall) -> torch.Tensor:
    """As in the package, by torch: the GQA group is folded into the query length, five times faster than enable_gqa.

    Serves neither soft caps nor sinks nor slopes.
    """
    q = call.q
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    bounds = call.query_start.tolist()
    for index, (row, length) in enumerate(zip(call.rows.tolist(), call.seq_lens.tolist(), strict=True)):
        span = slice(bounds[index], bounds[index + 1])
        keys, values = gather(call.kv, call.block_table[row], length)
        out[span] = _attend_folded(q[span], keys.to(q.dtype), values.to(q.dtype), call.scale, call.window)
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
