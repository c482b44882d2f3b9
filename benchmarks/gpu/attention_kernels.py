"""Attention over the paged cache, beside torch's own over contiguous keys and values of the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.setting import Setting, Work
from llmd_kernels.paged_attention import AttentionCall, paged_attention
from llmd_kernels.quantized_kv import LayerKV, half_bytes, quantize, view_quantized

_BLOCK_SIZE = 16
_TINY_DIVISOR = 64
_SHAPES = {"0.5B": (14, 2, 64), "7B": (28, 4, 128), "8B": (32, 8, 128)}


def call(
    device: torch.device, heads: tuple[int, int, int], num_rows: int, length: int, count: int, kv_dtype: Any = None
) -> AttentionCall:
    """Rows of equal length, `count` tokens of each in this step, whose blocks lie scattered."""
    num_heads, kv_heads, dim = heads
    held = -(-length // _BLOCK_SIZE)
    shape = (2, _BLOCK_SIZE, kv_heads, dim)
    kv = _cache(torch.randn(num_rows * held, *shape, device=device).bfloat16(), kv_dtype)
    tables = torch.randperm(num_rows * held, device=device).to(torch.int32).view(num_rows, held)
    q = torch.randn(num_rows * count, num_heads, dim, device=device).bfloat16()
    starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * count
    lengths = torch.full((num_rows,), length, dtype=torch.int32, device=device)
    return AttentionCall(q, kv, tables, torch.arange(num_rows, device=device), starts, lengths, count, dim**-0.5)


def _cache(kv: torch.Tensor, dtype: torch.dtype | None) -> LayerKV:
    """As it is, or in eight bits."""
    if dtype is None:
        return kv
    shape = tuple(kv.shape[1:])
    raw = torch.zeros(len(kv), 2, half_bytes(shape), dtype=torch.uint8, device=kv.device)
    held, (data, scales) = view_quantized(raw, shape, dtype), quantize(kv, dtype)
    held.data.view(torch.uint8).copy_(data.view(torch.uint8))
    held.scales.copy_(scales)
    return held


def _make(name: str, num_rows: int, length: int, count: int, kv_dtype: Any = None) -> Callable[..., Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        del config
        heads, kv_heads, dim = _SHAPES[name]
        size = max(length // _TINY_DIVISOR, 1) if setting.is_tiny else length
        queries = min(count, size)
        rows = min(num_rows, 2) if setting.is_tiny else num_rows
        ours = call(setting.device, _SHAPES[name], rows, size, queries, kv_dtype)
        byte_size = 2 if kv_dtype is None else 1
        return Work(
            lambda: paged_attention(ours),
            _plain(setting, name, rows, size, queries) if queries in (1, size) else None,
            2 * rows * size * kv_heads * (dim * byte_size + (0 if kv_dtype is None else 2)) if queries == 1 else 0,
            0 if queries == 1 else 4 * rows * heads * dim * queries * (size - (queries - 1) // 2),
        )

    return make


def _plain(setting: Setting, name: str, rows: int, size: int, queries: int) -> Callable[[], torch.Tensor]:
    """Torch's flash attention where there is one: prompts are whole, so that its causal mask is the right one."""
    heads, kv_heads, dim = _SHAPES[name]
    q = torch.randn(rows, heads, queries, dim, device=setting.device).bfloat16()
    k, v = (torch.randn(rows, kv_heads, size, dim, device=setting.device).bfloat16() for _ in range(2))

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

    if setting.device.type != "cuda":
        return attend

    def flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend()

    return flash


MAKE = {
    **{f"decode {name}, 64 x 2k": _make(name, 64, 2048, 1) for name in ("8B", "7B", "0.5B")},
    **{f"prefill {name}, 8k": _make(name, 1, 8192, 8192) for name in ("7B", "8B", "0.5B")},
    "decode 7B, 1 x 4k": _make("7B", 1, 4096, 1),
    "decode 7B, 8 x 2k": _make("7B", 8, 2048, 1),
    "decode 7B, 256 x 512": _make("7B", 256, 512, 1),
    "decode 8B, 1 x 16k": _make("8B", 1, 16384, 1),
    "extend 7B, 4 x 512 behind 3.5k": _make("7B", 4, 4096, 512),
    "decode 8B, 64 x 2k, fp8": _make("8B", 64, 2048, 1, torch.float8_e4m3fn),
    "decode 8B, 64 x 2k, int8": _make("8B", 64, 2048, 1, torch.int8),
}
