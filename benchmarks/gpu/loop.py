"""What a decode step costs the host when the engine drives it: CPU time by thread, and how long the device has to wait."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import write_model
from benchmarks.gpu.trace import device_use, export
from llmd import LLM, SamplingParams

_THREADS = ("llmd-loop", "llmd-executor")
_PATIENCE_S = 40.0
_TRACED_S = 0.15


class Reading(NamedTuple):
    """At one time."""

    at_s: float
    steps: int
    cpu_s: dict[str, float]  # by thread
    waiting_s: float  # CPU time that the executor spent in waiting for events, which it may do by spinning


class Waiting:
    """Counts the CPU time of waits for events."""

    def __init__(self) -> None:
        self.cpu_s = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While this is open."""
        inner = torch.cuda.Event.synchronize

        def synchronize(event: Any) -> None:
            start = time.thread_time()
            inner(event)
            self.cpu_s += time.thread_time() - start

        with mock.patch.object(torch.cuda.Event, "synchronize", synchronize):
            yield


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    return {"64 rows": lambda: steady(setting, 64), "256 rows": lambda: steady(setting, 256)}


def steady(setting: Setting, num_rows: int) -> dict[str, Any]:
    """Rows that all decode, behind the first steps and before the last ones."""
    num_rows, prompt, answer, steps = (3, 8, 40, 10) if setting.is_tiny else (num_rows, 64, 1500, 300)
    llm = _load(setting, num_rows, prompt + answer)
    try:
        work = _work(setting, num_rows, prompt)
        llm.generate(*work(24), use_tqdm=False)  # compiled and captured
        _profiled(setting, 0.0)  # the first profile takes seconds to begin
        waiting = Waiting()
        thread = threading.Thread(target=lambda: llm.generate(*work(answer), use_tqdm=False), name="requests")
        with waiting.counted():
            begun = _read(llm, waiting)
            thread.start()
            first = _after(llm, waiting, begun.steps + 20 if not setting.is_tiny else begun.steps + 4)
            last = _after(llm, waiting, first.steps + steps)
        use = _profiled(setting, _TRACED_S) if thread.is_alive() else {}
        thread.join()
    finally:
        llm.shutdown()
    return {**_figures(first, last, num_rows), **use}


def _load(setting: Setting, num_rows: int, length: int) -> LLM:
    write_model(setting.folder / "model", setting.model, is_tiny=setting.is_tiny)
    room: dict[str, Any] = {"kv_cache_memory_bytes": 16 << 20} if setting.is_tiny else {}
    return LLM(
        model=str(setting.folder / "model"), dtype="bfloat16", device=setting.device.type, load_format="dummy",
        max_model_len=length + 16, max_num_seqs=num_rows, **room,
    )  # fmt: skip


def _work(setting: Setting, num_rows: int, prompt: int) -> Callable[[int], tuple[Any, SamplingParams]]:
    """Requests for answers of so many tokens; prompts are new each time."""
    chance, most = random.Random(0), 900 if setting.is_tiny else 100_000

    def make(answer: int) -> tuple[Any, SamplingParams]:
        ids = [{"prompt_token_ids": [chance.randrange(most) for _ in range(prompt)]} for _ in range(num_rows)]
        params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=answer, ignore_eos=True, detokenize=False)
        return ids, params

    return make


def _read(llm: LLM, waiting: Waiting) -> Reading:
    async def steps() -> int:
        return llm._service.engine.stats().num_steps

    threads = {thread.name: thread.ident for thread in threading.enumerate() if thread.name in _THREADS}
    cpu = {name: time.clock_gettime(time.pthread_getcpuclockid(ident)) for name, ident in threads.items() if ident}
    return Reading(time.perf_counter(), llm._loop.call(steps()), cpu, waiting.cpu_s)


def _after(llm: LLM, waiting: Waiting, steps: int) -> Reading:
    """The first reading behind so many steps. Raises TimeoutError if they do not come."""
    end_s = time.monotonic() + _PATIENCE_S
    while (reading := _read(llm, waiting)).steps < steps:
        if time.monotonic() > end_s:
            raise TimeoutError(f"{reading.steps} of {steps} steps in {_PATIENCE_S:.0f} s")
        time.sleep(0.005)
    return reading


def _profiled(setting: Setting, seconds: float) -> dict[str, Any]:
    """How the device was used for a while."""
    is_cuda = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as found:
        time.sleep(seconds)
    if not seconds or not is_cuda:
        return {}
    return device_use(export(found, setting.folder / "kept" / "engine-trace.json.gz"))


def _figures(first: Reading, last: Reading, num_rows: int) -> dict[str, Any]:
    steps = last.steps - first.steps
    by_thread = {name: 1e3 * (last.cpu_s[name] - first.cpu_s[name]) / steps for name in _THREADS}
    spun = 1e3 * (last.waiting_s - first.waiting_s) / steps
    step_ms = 1e3 * (last.at_s - first.at_s) / steps
    return {
        "step_ms": round(step_ms, 3), "tokens_s": round(1e3 * num_rows / step_ms, 1),
        "cpu_ms": round(sum(by_thread.values()) - spun, 3), "loop_ms": round(by_thread["llmd-loop"], 3),
        "executor_ms": round(by_thread["llmd-executor"] - spun, 3), "spun_ms": round(spun, 3), "steps": steps,
    }  # fmt: skip
