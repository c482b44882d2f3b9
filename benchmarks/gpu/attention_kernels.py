"""Attention over the paged cache, beside torch's own over contiguous keys and values of the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.setting import Setting, Work
from llmd_kernels.paged_attention import AttentionCall, paged_attention

_BLOCK_SIZE = 16
_TINY_DIVISOR = 64
_SHAPES = {"0.5B": (14, 2, 64), "7B": (28, 4, 128), "8B": (32, 8, 128)}


def call(device: torch.device, heads: tuple[int, int, int], num_rows: int, length: int, count: int) -> AttentionCall:
    """Rows of equal length, `count` tokens of each in this step, whose blocks lie scattered."""
    num_heads, kv_heads, dim = heads
    held = -(-length // _BLOCK_SIZE)
    kv = torch.randn(num_rows * held, 2, _BLOCK_SIZE, kv_heads, dim, device=device).bfloat16()
    tables = torch.randperm(num_rows * held, device=device).to(torch.int32).view(num_rows, held)
    q = torch.randn(num_rows * count, num_heads, dim, device=device).bfloat16()
    starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * count
    lengths = torch.full((num_rows,), length, dtype=torch.int32, device=device)
    return AttentionCall(q, kv, tables, torch.arange(num_rows, device=device), starts, lengths, count, dim**-0.5)


def _make(name: str, num_rows: int, length: int, count: int) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        del config
        heads, kv_heads, dim = _SHAPES[name]
        size = max(length // _TINY_DIVISOR, 1) if setting.is_tiny else length
        queries = min(count, size)
        rows = min(num_rows, 2) if setting.is_tiny else num_rows
        ours = call(setting.device, _SHAPES[name], rows, size, queries)
        q = torch.randn(rows, heads, queries, dim, device=setting.device).bfloat16()
        k, v = (torch.randn(rows, kv_heads, size, dim, device=setting.device).bfloat16() for _ in range(2))
        causal = queries == size and queries > 1
        return Work(
            lambda: paged_attention(ours),
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True),
            4 * rows * size * kv_heads * dim if queries == 1 else 0,
            0 if queries == 1 else 2 * rows * heads * dim * queries * size,
        )

    return make


MAKE = {
    **{f"decode {name}, 64 x 2k": _make(name, 64, 2048, 1) for name in _SHAPES},
    **{f"decode {name}, 1 x 16k": _make(name, 1, 16384, 1) for name in _SHAPES},
    **{f"prefill {name}, 8k": _make(name, 1, 8192, 8192) for name in _SHAPES},
}
