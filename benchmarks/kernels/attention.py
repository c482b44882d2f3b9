"""Decode over long contexts by what the KV cache holds: how many times as fast as over bfloat16.

Rounds are interleaved, so that a busy machine slows all alike, and contexts lie in pools larger than the caches; the least
CPU time of a thread counts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.results import report
from llmd_kernels import native
from llmd_kernels.paged_attention import AttentionCall, paged_attention
from llmd_kernels.quantized_kv import LayerKV, half_bytes, view_quantized
from llmd_kernels.store_kv import store_kv

KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
SHAPES = {"0.5B (14/2 heads of 64)": (14, 2, 64), "8B (32/8 heads of 128)": (32, 8, 128)}
CASES = ((1, 2048), (1, 16384), (8, 2048))  # rows, tokens of each
BLOCK_SIZE = 16


def call_of(kind: torch.dtype, shape: tuple[int, int, int], num_rows: int, length: int) -> AttentionCall:
    """A decode step of rows whose blocks lie scattered."""
    heads, kv_heads, dim = shape
    held = -(-length // BLOCK_SIZE)
    num_blocks, kv_shape = num_rows * held, (2, BLOCK_SIZE, kv_heads, dim)
    kv: LayerKV = torch.zeros(num_blocks, *kv_shape, dtype=torch.uint8 if kind.itemsize == 1 else kind)
    if kind.itemsize == 1:
        kv = view_quantized(torch.zeros(num_blocks, 2, half_bytes(kv_shape), dtype=torch.uint8), kv_shape, kind)
    k, v = torch.randn(2, num_blocks * BLOCK_SIZE, kv_heads, dim).bfloat16()
    store_kv(k, v, kv, torch.arange(num_blocks * BLOCK_SIZE))
    tables = torch.randperm(num_blocks).to(torch.int32).view(num_rows, held)
    q = torch.randn(num_rows, heads, dim).bfloat16()
    starts, lengths = torch.arange(num_rows + 1, dtype=torch.int32), torch.full((num_rows,), length, dtype=torch.int32)
    return AttentionCall(q, kv, tables, torch.arange(num_rows), starts, lengths, 1, dim**-0.5)


def least_seconds(shape: tuple[int, int, int], num_rows: int, length: int, rounds: int) -> dict[str, float]:
    """By kind, of one call."""
    calls = {name: call_of(kind, shape, num_rows, length) for name, kind in KINDS.items()}
    times: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            paged_attention(call)
            times[name] = min(times.get(name, 1e9), time.thread_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    native.set_num_threads(1)
    figures: dict[str, dict[str, float]] = {}
    for name, shape in SHAPES.items():
        for num_rows, length in CASES:
            times = least_seconds(shape, num_rows, length, arguments.rounds)
            figures[f"{name}, {num_rows} x {length} tokens"] = {
                "bf16 ms": round(times["bf16"] * 1e3, 3),
                **{kind: round(times["bf16"] / times[kind], 2) for kind in KINDS if kind != "bf16"},
            }
    report({"decode, times as fast as over bf16": figures}, arguments.output)


if __name__ == "__main__":
    main()
