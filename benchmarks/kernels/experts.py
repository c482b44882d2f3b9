"""A mixture of experts in one op beside the same experts one after another, by tokens in a step and by format of W.

Times as fast as the loop, the share of what memory delivers to a pass that only reads the weights of the experts in use, and
the work a second. Rounds are interleaved; layers of their own weights follow each other, each time by other routes, so that
weights come from memory. One thread is measured by its CPU time, several by the wall's: for a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from llmd.model.weight_memory import WeightMemory
from llmd_kernels import native
from llmd_kernels.experts import ExpertWeights, Fp8Weight, Weight, experts, reference, route
from llmd_kernels.fp8_linear import quantize_weight
from llmd_kernels.grouped_linear import pack
from llmd_kernels.int8_linear import quantize
from llmd_kernels.machine import read_s
from llmd_kernels.silu_mul import silu_mul

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report

TOKENS = (1, 8, 64, 512)
LEAST_S = 10e-3  # of each measurement
ROUTES = 5
BUFFER_BYTES = 512 << 20


class Layer(NamedTuple):
    """The experts of one layer."""

    gate_up: ExpertWeights
    down: ExpertWeights


def in_one(layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> object:
    return experts(x, ids, weights, layer.gate_up, layer.down)


def one_by_one(layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> object:
    return reference.experts(x, ids, weights, layer.gate_up, layer.down, silu_mul)


def grouped(weight: torch.Tensor) -> Weight:
    q = torch.randint(0, 16, weight.shape, dtype=torch.uint8)
    return pack(q, torch.rand(weight.shape[0], -(-weight.shape[1] // 64)) * 1e-2, bits=4, group_size=64, zero=8)


def fp8(weight: torch.Tensor) -> Weight:
    return Fp8Weight(*quantize_weight(weight), None, "float", None)


KINDS: dict[str, tuple[Callable[[torch.Tensor], Weight], float]] = {  # how an expert's weight is made, bytes of a number
    "bf16": (torch.clone, 2),
    "int8": (quantize, 1),
    "int4 g64": (grouped, 0.5),
    "fp8": (fp8, 1),
}


def layers(kind: str, options: argparse.Namespace) -> list[Layer]:
    """All experts hold the same numbers, each in memory of its own, as a loaded model's lies."""
    make, memory = KINDS[kind][0], WeightMemory()
    shapes = ((2 * options.inner, options.hidden), (options.hidden, options.inner))
    dense = [torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5) for shape in shapes]

    def expert(weight: torch.Tensor) -> Weight:
        made = make(weight)
        for tensor in [made] if isinstance(made, torch.Tensor) else made:
            if isinstance(tensor, torch.Tensor):
                memory.adopt(tensor)
        return made

    return [
        Layer(*(ExpertWeights([expert(weight) for _ in range(options.experts)]) for weight in dense))
        for _ in range(options.layers)
    ]


def routes(tokens: int, options: argparse.Namespace) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """ROUTES times what routers may have said, for each layer."""
    return [
        [route(torch.randn(tokens, options.experts), options.chosen, normalized=True) for _ in range(options.layers)]
        for _ in range(ROUTES)
    ]


def measure(kind: str, options: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """Seconds of one layer, by tokens and way, in the order of the rounds; and how many bytes of W it reads."""
    made, buffer = layers(kind, options), torch.ones(BUFFER_BYTES // 4)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    times: dict[int, dict[str, list[float]]] = {}
    for tokens in options.tokens:
        x, some = torch.randn(tokens, options.hidden).bfloat16(), routes(tokens, options)
        used = sum(len(ids.unique()) for layer in some for ids, _ in layer) / (ROUTES * options.layers)
        used_bytes = int(used * 3 * options.hidden * options.inner * KINDS[kind][1])
        parts = itertools.cycle(buffer.split(used_bytes // 4)[:-1])
        ways = {"llmd": in_one, "loop": one_by_one, "read": lambda *_, parts=parts: read_s(next(parts))}
        times[tokens] = {name: [] for name in ways} | {"bytes": [float(used_bytes)]}
        turns = itertools.cycle(some)
        for turn, (name, way) in itertools.product(range(-1, options.rounds), ways.items()):
            start, done = clock(), 0
            while not done or clock() - start < LEAST_S:
                for layer, (ids, weights) in zip(made, next(turns), strict=True):
                    way(layer, x, ids, weights)
                done += len(made)
            if turn >= 0:  # the first one warms up
                times[tokens][name].append((clock() - start) / done)
    return times


def figures(times: dict[str, list[float]], tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """What one number of tokens comes to."""
    ours, work = median(times["llmd"]), 6e-9 * tokens * options.chosen * options.hidden * options.inner
    slower = {
        name: median(other / mine for other, mine in zip(times[name], times["llmd"], strict=True))
        for name in ("loop", "read")
    }
    return {
        "us a layer": round(ours * 1e6, 1),
        "x loop": round(slower["loop"], 2),
        "of read": round(slower["read"], 2),
        "GB/s": round(times["bytes"][0] / ours * 1e-9, 1),
        "GF/s": round(work / ours, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    for name, default in (("hidden", 1024), ("inner", 768), ("experts", 32), ("chosen", 4), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native.set_num_threads(options.threads)
    found = {}
    for kind in options.kinds:
        times = measure(kind, options)
        found[kind] = {f"{tokens} tokens": figures(times[tokens], tokens, options) for tokens in options.tokens}
    report({"threads": options.threads, "by format": found}, options.output)


if __name__ == "__main__":
    main()
