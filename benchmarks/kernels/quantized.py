"""Quantized products beside the bfloat16 one: how many times as fast, by rows of x, on shapes of small and large models.

Rounds are interleaved and the weights rotated among enough copies to come from memory, so that a busy machine slows all
alike; the least CPU time of a thread counts. `--threads 2` measures wall time instead: for a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from llmd_kernels import native
from llmd_kernels.fp8_linear import fp8_linear, quantize_weight
from llmd_kernels.grouped_linear import grouped_linear, pack
from llmd_kernels.int8_linear import int8_linear, quantize
from llmd_kernels.linear import linear

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report

# [N, K] of the linears: a layer of a 0.5B Qwen2, and the widest of an 8B Llama
SHAPES = {"0.5B": [(1152, 896), (896, 896), (9728, 896), (896, 4864)], "4096x14336": [(14336, 4096)]}
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
CACHE_BYTES = 48 << 20  # what the copies of one linear exceed together
Product = Callable[[torch.Tensor], torch.Tensor]


def bf16(weight: torch.Tensor) -> Product:
    dense = weight.bfloat16()
    return lambda x: linear(x, dense)


def int8(weight: torch.Tensor) -> Product:
    quantized = quantize(weight)
    return lambda x: int8_linear(x, quantized)


def grouped(bits: int, group_size: int) -> Callable[[torch.Tensor], Product]:
    def make(weight: torch.Tensor) -> Product:
        q = torch.randint(0, 1 << bits, weight.shape, dtype=torch.uint8)
        scale = torch.rand(weight.shape[0], weight.shape[1] // group_size) * 1e-3
        packed = pack(q, scale, bits=bits, group_size=group_size, zero=1 << (bits - 1))
        return lambda x: grouped_linear(x, packed)

    return make


def fp8(block: tuple[int, int] | None) -> Callable[[torch.Tensor], Product]:
    def make(weight: torch.Tensor) -> Product:
        stored, scale = quantize_weight(weight, block)
        return lambda x: fp8_linear(x, stored, scale, block=block)

    return make


KINDS: dict[str, tuple[Callable[[torch.Tensor], Product], float]] = {  # how it is made, bytes a weight
    "bf16": (bf16, 2),
    "int8": (int8, 1),
    "int8 g128": (grouped(8, 128), 1),
    "int4 g128": (grouped(4, 128), 0.5),
    "int4 g64": (grouped(4, 64), 0.5),
    "int4 g32": (grouped(4, 32), 0.5),
    "fp8": (fp8(None), 1),
    "fp8 128x128": (fp8((128, 128)), 1),
}


def copies(kind: str, width: int, depth: int) -> Iterator[Product]:
    """Products with one weight after the other, for ever."""
    make, bytes_ = KINDS[kind]
    number = int(CACHE_BYTES // (width * depth * bytes_)) + 1
    return itertools.cycle([make(torch.randn(width, depth) * 0.02) for _ in range(number)])


def least_seconds(
    shape: tuple[int, int], kinds: list[str], rows: list[int], rounds: int, clock: Callable[[], float]
) -> dict[tuple[str, int], float]:
    """By kind and rows, of one product."""
    products = {kind: copies(kind, *shape) for kind in kinds}
    inputs = {count: torch.randn(count, shape[1]).bfloat16() for count in rows}
    times: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        for count, kind in itertools.product(rows, kinds):
            product, x = next(products[kind]), inputs[count]
            start = clock()
            product(x)
            taken = clock() - start
            times[kind, count] = min(taken, times.get((kind, count), taken))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    figures = {}
    for name in arguments.shapes:
        total: dict[tuple[str, int], float] = {}
        for shape in SHAPES[name]:
            for key, seconds in least_seconds(shape, arguments.kinds, arguments.rows, arguments.rounds, clock).items():
                total[key] = total.get(key, 0.0) + seconds
        figures[name] = {
            f"{count} rows": {
                "bf16 ms": round(total["bf16", count] * 1e3, 3),
                **{kind: round(total["bf16", count] / total[kind, count], 2) for kind in arguments.kinds if kind != "bf16"},
            }
            for count in arguments.rows
        }
    report({"threads": arguments.threads, "times as fast as bf16": figures}, arguments.output)


if __name__ == "__main__":
    main()
