"""What a decode step costs the host on a device whose graphs take no time: CPU milliseconds of loop and executor thread.

    python benchmarks/engine/device_step.py [--rows 64] [--tokens 600] [--output FILE]

The daemon's own loop and executor serve requests, text included, over decode steps that are replayed as on a GPU, by graphs
that do nothing. What is left is all that llmd does between two steps, but for the calls of the GPU's driver: a copy there,
two launches of graphs, a copy back and three events, some tens of microseconds. Prints CPU milliseconds a step as JSON.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from llmd import LLM, SamplingParams
from llmd.model.cuda_graphs import sizes_of
from llmd.model.sampler import SampledTokens, TorchSampler

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report

_THREADS = ("llmd-loop", "llmd-executor")


class EmptyGraphs:
    """Capture whose graphs do nothing when they are replayed."""

    is_free = False

    def __init__(self, device: torch.device) -> None:
        pass

    def sizes(self, max_num_rows: int) -> tuple[int, ...]:
        """As on a GPU."""
        return sizes_of(max_num_rows)

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Any, str]:
        """The work is done once."""
        return work(), SimpleNamespace(replay=lambda: None), ""


def _launches(sampler: TorchSampler, host_rows: tuple[int, ...]) -> str:
    """What rows want is looked up, and is always the same."""
    sampler._prepared(host_rows)
    return "first"


def _sample(sampler: TorchSampler, logits: Tensor, *args: Any, host_rows: Any = (), **options: Any) -> SampledTokens:
    """The likeliest tokens, by work that can be recorded."""
    best, tokens = logits.max(1)
    return SampledTokens(tokens, best, tuple(host_rows), None, (), ())


def _cpu_s() -> dict[str, float]:
    threads = {thread.name: thread.ident for thread in threading.enumerate() if thread.name in _THREADS}
    return {name: time.clock_gettime(time.pthread_getcpuclockid(ident)) for name, ident in threads.items() if ident}


def _steps(llm: LLM) -> int:
    async def count() -> int:
        return llm._service.engine.stats().num_steps

    return llm._loop.call(count())


def _readings(llm: LLM, end: threading.Event) -> Iterator[tuple[int, dict[str, float]]]:
    while not end.is_set():
        yield _steps(llm), _cpu_s()
        time.sleep(0.05)


def measure(num_rows: int, num_tokens: int) -> dict[str, float]:
    """CPU milliseconds a step, between a quarter and three quarters of the steps."""
    torch.set_num_threads(1)
    with (
        mock.patch("llmd.model.runner.capture_for", EmptyGraphs),
        mock.patch.object(TorchSampler, "launches", _launches, create=True),
        mock.patch.object(TorchSampler, "sample", _sample),
    ):
        llm = LLM(model="demo", device="cpu", dtype="float32", max_num_seqs=num_rows, max_model_len=num_tokens + 64)
        try:
            return _measured(llm, num_rows, num_tokens)
        finally:
            llm.shutdown()


def _measured(llm: LLM, num_rows: int, num_tokens: int) -> dict[str, float]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    prompts = [f"{index} is a number" for index in range(num_rows)]
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True), use_tqdm=False)
    end, begun = threading.Event(), _steps(llm)

    def generate() -> None:
        llm.generate(prompts, params, use_tqdm=False)
        end.set()

    threading.Thread(target=generate, name="requests").start()
    inner = [reading for reading in _readings(llm, end) if num_tokens // 4 < reading[0] - begun < num_tokens * 3 // 4]
    (first, before), (last, after) = inner[0], inner[-1]
    by_thread = {name: 1e3 * (after[name] - before[name]) / (last - first) for name in _THREADS}
    return {
        "rows": num_rows, "steps": last - first, "loop_ms": round(by_thread["llmd-loop"], 3),
        "executor_ms": round(by_thread["llmd-executor"], 3), "both_ms": round(sum(by_thread.values()), 3),
    }  # fmt: skip


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    report(measure(given.rows, given.tokens), given.output)


if __name__ == "__main__":
    main()
