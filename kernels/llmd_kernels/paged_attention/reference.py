"""The truth, in torch: row by row, the whole score matrix."""

from __future__ import annotations

import torch


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
    """Causal attention of q [T, H, D] over the KV cache; shapes as in the package's `paged_attention`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    bounds = query_start.tolist()
    for index, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        span = slice(bounds[index], bounds[index + 1])
        keys, values = gather(kv, block_table[row], length)
        out[span] = attend(q[span], keys, values, length, scale, window)
    return out


def gather(kv: torch.Tensor, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [length, K, D] of one sequence."""
    num_blocks = -(-length // kv.shape[2])
    held = kv[blocks[:num_blocks].long()]  # [blocks, 2, block_size, K, D]
    return held[:, 0].flatten(0, 1)[:length], held[:, 1].flatten(0, 1)[:length]


def visible(num_queries: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[num_queries, length] bool: which positions the last `num_queries` tokens of a sequence may see."""
    position = torch.arange(length - num_queries, length, device=device).unsqueeze(1)
    other = torch.arange(length, device=device)
    mask = other <= position
    return mask if window is None else mask & (other > position - window)


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: int, scale: float, window: int | None
) -> torch.Tensor:
    """q [N, H, D], the last N tokens, over keys and values [length, K, D], in float32."""
    group = q.shape[1] // keys.shape[1]
    wide_keys = keys.float().repeat_interleave(group, dim=1)
    wide_values = values.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,lhd->hnl", q.float(), wide_keys) * scale
    scores = scores.masked_fill(~visible(q.shape[0], length, window, q.device), float("-inf"))
    return torch.einsum("hnl,lhd->nhd", scores.softmax(-1), wide_values).to(q.dtype)
