"""Decode and prefill by what the KV cache holds: bytes a second, and how many times as fast as over bfloat16.

Rounds are interleaved, so that a busy machine slows all alike, and contexts lie in pools larger than the caches; the least
time counts. Of one thread that is its CPU time, of several the clock's.
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
CASES = ((1, 160, 1), (16, 160, 1), (64, 160, 1), (1, 2048, 1), (1, 16384, 1), (8, 2048, 1), (1, 1024, 1024))
# rows, tokens of each, tokens of each in this step
POOL_BYTES = 64 << 20  # what is read lies anywhere in so many at least
BLOCK_SIZE = 16


def call_of(kind: torch.dtype, shape: tuple[int, int, int], num_rows: int, length: int, queries: int) -> AttentionCall:
    """A step of rows whose blocks lie scattered; its block table has room for as many steps as the pool has."""
    heads, kv_heads, dim = shape
    held, kv_shape = -(-length // BLOCK_SIZE), (2, BLOCK_SIZE, kv_heads, dim)
    steps = -(-POOL_BYTES // (num_rows * held * 2 * half_bytes(kv_shape)))
    num_blocks = steps * num_rows * held
    kv: LayerKV = torch.zeros(num_blocks, *kv_shape, dtype=torch.uint8 if kind.itemsize == 1 else kind)
    if kind.itemsize == 1:
        kv = view_quantized(torch.zeros(num_blocks, 2, half_bytes(kv_shape), dtype=torch.uint8), kv_shape, kind)
    k, v = torch.randn(2, num_blocks * BLOCK_SIZE, kv_heads, dim).bfloat16()
    store_kv(k, v, kv, torch.arange(num_blocks * BLOCK_SIZE))
    tables = torch.randperm(num_blocks).to(torch.int32).view(steps * num_rows, held)
    q = torch.randn(num_rows * queries, heads, dim).bfloat16()
    starts = torch.arange(0, num_rows * queries + 1, queries, dtype=torch.int32)
    lengths = torch.full((num_rows,), length, dtype=torch.int32)
    return AttentionCall(q, kv, tables, torch.arange(num_rows), starts, lengths, queries, dim**-0.5)


def least_seconds(shape: tuple[int, int, int], case: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """By kind, of one call; each round reads another part of the pool."""
    calls = {name: call_of(kind, shape, *case) for name, kind in KINDS.items()}
    clock = time.thread_time if native.num_threads() == 1 else time.perf_counter
    times: dict[str, float] = {}
    for index in range(rounds):
        for name, call in calls.items():
            first = index * case[0] % call.block_table.shape[0]
            call = call._replace(rows=torch.arange(first, first + case[0]))
            start = clock()
            paged_attention(call)
            times[name] = min(times.get(name, 1e9), clock() - start)
    return times


def figures_of(shape: tuple[int, int, int], case: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """What is reported of a case."""
    times = least_seconds(shape, case, rounds)
    num_rows, length, queries = case
    if queries == 1:
        unit, work = "bf16 GB/s", num_rows * length * 2 * shape[1] * shape[2] * 2
    else:
        unit, work = "bf16 GF/s", 4 * num_rows * shape[0] * shape[2] * (queries * length - queries * (queries - 1) // 2)
    return {
        "bf16 ms": round(times["bf16"] * 1e3, 4),
        unit: round(work / times["bf16"] / 1e9, 1),
        **{kind: round(times["bf16"] / times[kind], 2) for kind in KINDS if kind != "bf16"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native.set_num_threads(arguments.threads)
    figures: dict[str, dict[str, float]] = {}
    for name, shape in SHAPES.items():
        for case in CASES:
            num_rows, length, queries = case
            kind = "decode" if queries == 1 else "prefill"
            figures[f"{name}, {kind}, {num_rows} x {length} tokens"] = figures_of(shape, case, arguments.rounds)
    report({"threads": arguments.threads, "times as fast as over bf16": figures}, arguments.output)


if __name__ == "__main__":
    main()
