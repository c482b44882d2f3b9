"""The truth, in torch: row by row, the whole score matrix."""

from __future__ import annotations

import torch

from llmd_kernels.paged_attention.call import AttentionCall
from llmd_kernels.quantized_kv import QuantizedKV, dequantize


def paged_attention(call: AttentionCall) -> torch.Tensor:
    """[T, H, D] in q's dtype, contiguous."""
    out = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    bounds = call.query_start.tolist()
    for index, (row, length) in enumerate(zip(call.rows.tolist(), call.seq_lens.tolist(), strict=True)):
        span = slice(bounds[index], bounds[index + 1])
        keys, values = gather(call.kv, call.block_table[row], length)
        out[span] = attend(call, call.q[span], keys, values)
    return out


def gather(kv: torch.Tensor | QuantizedKV, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [length, K, D] of one sequence."""
    held = blocks[: -(-length // kv.shape[2])].long()
    some = dequantize(kv.data[held], kv.scales[held]) if isinstance(kv, QuantizedKV) else kv[held]
    return some[:, 0].flatten(0, 1)[:length], some[:, 1].flatten(0, 1)[:length]  # from [blocks, 2, block_size, K, D]


def visible(num_queries: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[num_queries, length] bool: which positions the last `num_queries` tokens of a sequence may see."""
    distance = distances(num_queries, length, device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def distances(num_queries: int, length: int, device: torch.device) -> torch.Tensor:
    """[num_queries, length] int64: how far before each of the last `num_queries` tokens a position lies."""
    position = torch.arange(length - num_queries, length, device=device).unsqueeze(1)
    return position - torch.arange(length, device=device)


def attend(call: AttentionCall, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q [N, H, D], the last N tokens, over keys and values [length, K, D], in float32."""
    group = q.shape[1] // keys.shape[1]
    wide_keys = keys.float().repeat_interleave(group, dim=1)
    wide_values = values.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,lhd->hnl", q.float(), wide_keys) * call.scale
    if call.soft_cap is not None:
        scores = torch.tanh(scores / call.soft_cap) * call.soft_cap
    if call.alibi_slopes is not None:
        scores = scores - call.alibi_slopes[:, None, None] * distances(len(q), len(keys), q.device)
    scores = scores.masked_fill(~visible(len(q), len(keys), call.window, q.device), float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks[:, None, None].expand(-1, len(q), 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, wide_values).to(q.dtype)
