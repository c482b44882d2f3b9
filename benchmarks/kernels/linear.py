"""The bfloat16 product beside torch's two, packed at each call or beforehand, and beside a pass that only reads W.

By rows of x, over the linears of a model: how many times as fast as each, the work a second, and the share of the read
pass. Rounds are interleaved, and the weights rotated among enough copies to come from memory.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from llmd_kernels import native
from llmd_kernels.linear import linear

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report

SHAPES = {"qkv": (1152, 896), "o": (896, 896), "gate_up": (9728, 896), "down": (896, 4864)}  # [N, K] of a 0.5B Qwen2
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
COPIES_BYTES = 256 << 20  # of each weight together
LEAST_S = 4e-3  # of each measurement
READ = """
#include <cstdint>
#include <omp.h>
extern "C" __attribute__((visibility("default"))) uint64_t read_all(const char* p, int64_t size) {
  typedef uint64_t v __attribute__((vector_size(64), aligned(1)));
  uint64_t all = 0;
#pragma omp parallel reduction(| : all)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    v sum[8] = {};
    for (int64_t i = size / 512 * thread / count; i < size / 512 * (thread + 1) / count; i++)
      for (int j = 0; j < 8; j++) sum[j] |= *(const v*)(p + i * 512 + j * 64);
    for (int j = 0; j < 64; j++) all |= sum[j / 8][j % 8];
  }
  return all;
}
"""
Way = Callable[[torch.Tensor, torch.Tensor], object]


def reader() -> Way:
    """A pass over the bytes of W, by as many threads as torch has."""
    with tempfile.TemporaryDirectory() as folder:
        source, compiled, path = (Path(folder, f"read.{suffix}") for suffix in ("cpp", "o", "so"))
        source.write_text(READ, encoding="utf-8")
        native.library()  # makes torch's OpenMP visible, which this links with: one team of threads for all
        subprocess.run(["g++", *native.FLAGS, "-c", str(source), "-o", str(compiled)], check=True, timeout=60)
        subprocess.run(["g++", "-shared", str(compiled), "-o", str(path)], check=True, timeout=60)
        read_all = ctypes.CDLL(str(path)).read_all
    read_all.argtypes, read_all.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint64
    return lambda x, weight: read_all(weight.data_ptr(), weight.nbytes)


def prepacked(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """OneDNN with W in the layout of its own."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def measure(width: int, depth: int, rows: tuple[int, ...], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Seconds of one product, by rows and way, in the order of the rounds."""
    count = COPIES_BYTES // (width * depth * 2) + 1
    weights = [torch.empty(width, depth, dtype=torch.bfloat16).normal_(std=0.02) for _ in range(count)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
    ways: dict[str, tuple[Way, list[torch.Tensor]]] = {
        "llmd": (linear, weights),
        "F.linear": (F.linear, weights),
        "prepacked": (prepacked, packed),
        "read": (reader(), weights),
    }
    turns = {name: itertools.cycle(copies) for name, (_, copies) in ways.items()}
    times: dict[int, dict[str, list[float]]] = {}
    for number in rows:
        x = torch.randn(number, depth).bfloat16()
        times[number] = {name: [] for name in ways}
        repeats = int(LEAST_S * 2e11 / (number * width * depth * 2) / max(1, 8 / number)) + 1
        for turn, (name, (way, _)) in itertools.product(range(-1, rounds), ways.items()):
            start = time.perf_counter()
            for _ in range(repeats):
                way(x, next(turns[name]))
            if turn >= 0:  # the first one warms up
                times[number][name].append((time.perf_counter() - start) / repeats)
    return times


def figures(times: dict[str, list[float]], width: int, depth: int, rows: int) -> dict[str, float]:
    """What one shape and number of rows comes to."""
    ours = median(times["llmd"])
    faster = {
        f"x {name}": median(theirs / mine for theirs, mine in zip(times[name], times["llmd"], strict=True))
        for name in ("F.linear", "prepacked", "read")
    }
    rates = {"us": ours * 1e6, "GF/s": 2e-9 * rows * width * depth / ours, "GB/s": 2e-9 * width * depth / ours}
    return {name: round(value, 2 if name.startswith("x ") else 1) for name, value in (rates | faster).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native.set_num_threads(arguments.threads)
    rows, by_shape, totals = tuple(arguments.rows), {}, {number: dict[str, float]() for number in arguments.rows}
    for name in arguments.shapes:
        width, depth = SHAPES[name]
        times = measure(width, depth, rows, arguments.rounds)
        by_shape[name] = {f"{number} rows": figures(times[number], width, depth, number) for number in rows}
        for number, way in itertools.product(rows, times[rows[0]]):
            totals[number][way] = totals[number].get(way, 0.0) + median(times[number][way])
    together = {
        f"{number} rows": {f"x {way}": round(s / total["llmd"], 2) for way, s in total.items() if way != "llmd"}
        for number, total in totals.items()
    }
    report({"threads": arguments.threads, "a layer": together, "by shape": by_shape}, arguments.output)


if __name__ == "__main__":
    main()
