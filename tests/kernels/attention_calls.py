"""Calls of paged attention at odd sizes: scattered blocks, garbage in free slots, strided q."""

import torch

from llmd_kernels.paged_attention import AttentionCall
from llmd_kernels.quantized_kv import LIMITS, half_bytes, quantize, view_quantized


def make_call(lengths, counts, heads, kv_heads, dim, block_size, dtype=torch.float32, kv_dtype=None, **extras):
    """One call of rows that have `lengths` tokens, `counts` of them in this step."""
    torch.manual_seed(0)
    num_blocks = sum(-(-length // block_size) for length in lengths) + 3
    pool = torch.randn(num_blocks, 3, 2, block_size, kv_heads, dim)
    pool[0] = float("nan")
    order = (torch.randperm(num_blocks - 1) + 1).to(torch.int32)
    tables = torch.zeros(9, max(lengths) // block_size + 2, dtype=torch.int32)
    rows, used = torch.randperm(9)[: len(lengths)], 0
    for row, length in zip(rows, lengths, strict=True):
        held = -(-length // block_size)
        tables[row, :held] = order[used : used + held]
        used += held
        if length % block_size:  # slots that nobody has written yet
            pool[tables[row, held - 1].item(), :, :, length % block_size :] = float("nan")
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    q = torch.randn(sum(counts), (heads + 2) * dim).to(dtype)[:, : heads * dim].view(-1, heads, dim)
    kv = quantized(pool, kv_dtype) if kv_dtype in LIMITS else pool.to(kv_dtype or dtype)[:, 1]
    return AttentionCall(
        q, kv, tables, rows, starts, torch.tensor(lengths, dtype=torch.int32), max(counts), dim**-0.5, **extras
    )


def quantized(pool, dtype):
    """Layer 1 of three, in eight bits."""
    shape = tuple(pool.shape[2:])
    raw = torch.zeros(*pool.shape[:2], 2, half_bytes(shape), dtype=torch.uint8)
    layer = view_quantized(raw[:, 1], shape, dtype)
    data, scales = quantize(pool[:, 1], dtype)
    layer.data.view(torch.uint8).copy_(data.view(torch.uint8))
    layer.scales.copy_(scales)
    return layer
