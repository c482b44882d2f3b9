"""A GPU without memory in the middle of a step: what executor and engine make of it, on a device that computes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random

import pytest
import torch
from engine.driving import Sink
from model.fake_cuda import fake_cuda
from model.tiny_models import make_model, save_model

from llmd.api.v1.testing.driver import installed_parts
from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.engine import Engine
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason
from llmd.model import kv_tensors
from llmd.model.executor import ThreadExecutor
from llmd.model.kv_tensors import NoRoom
from llmd.model.out_of_memory import is_out_of_memory
from llmd.model.runner import Runner
from llmd_plugins.scheduling.fcfs import FcfsQueue

pytest.importorskip("triton")

LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("HIP error: out of memory"),
]


@pytest.mark.parametrize("error", LACKS, ids=lambda error: str(error)[:20])
def test_all_that_says_that_memory_lacks(error):
    assert is_out_of_memory(error)
    outer = ValueError("loading failed")
    outer.__cause__ = error
    assert is_out_of_memory(outer)


def test_other_errors_do_not():
    for error in (
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
        KeyError(),
    ):
        assert not is_out_of_memory(error)
    first = last = RuntimeError("0")
    for index in range(20):  # a chain without an end is not followed for ever
        last.__cause__ = RuntimeError(str(index))
        last = last.__cause__
    last.__cause__ = first
    assert not is_out_of_memory(first)


class OnFakeCuda(ThreadExecutor):
    """Its thread is the one that sees the device; `faults` are errors by place, each raised once, when it is passed."""

    def _run(self) -> None:
        with fake_cuda() as self.device:
            self.num_emptied = 0
            torch.cuda.empty_cache = self._emptied  # put back with the rest
            super()._run()

    def _emptied(self) -> None:
        self.num_emptied += 1

    def watch(self) -> None:
        """Errors from now on; the model is there."""
        self.faults: list[tuple[str, BaseException]] = []
        runner = self._runner
        for place, owner, name in (
            ("apply", runner.rows, "admit"), ("prefill", runner, "forward"), ("logits", runner, "logits"),
            ("sampling", runner._sampler, "sample"), ("decode", runner._graphs, "run"),
        ):  # fmt: skip
            setattr(owner, name, self._faulty(place, getattr(owner, name)))

    def _faulty(self, place, inner):
        def call(*args, **kwargs):
            found = next((fault for fault in self.faults if fault[0] == place), None)
            if found is not None:
                self.faults.remove(found)
                raise found[1]
            return inner(*args, **kwargs)

        return call


@contextlib.asynccontextmanager
async def serving(path, **model):
    """An engine over such a device."""
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32)
    cache = CacheConfig(block_size=4, kv_cache_bytes=8 << 20)
    config = ModelConfig(model=str(path), dtype="float32", device="cuda", **model)
    executor = OnFakeCuda(config, cache, scheduler, path, installed_parts())
    sink = Sink()
    engine = Engine(executor, scheduler, cache, waiting=FcfsQueue(), publish=sink.publish)
    await engine.start(lambda progress: None)
    executor.watch()
    executor.num_emptied = 0
    try:
        yield engine, sink, executor
    finally:
        await engine.stop()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(make_model("Qwen3"), tmp_path_factory.mktemp("model"))


def add(engine, name, length=20, **params):
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params})
    engine.add(Request(request_id=name, prompt=Prompt(tuple(range(1, length + 1))), params=params))


async def test_a_place_that_finds_no_memory_costs_one_step(path):
    async with serving(path) as (engine, sink, executor):
        places = ("apply", "prefill", "logits", "sampling", "decode")
        for nth, place in enumerate(places, start=1):
            executor.faults.append((place, LACKS[nth % 4]))
            executor.num_emptied = 0
            for index, wanted in enumerate(({}, {"logprobs": 2}, {"prompt_logprobs": 1}, {"temperature": 1.0})):
                add(engine, f"{place}{index}", 3 + 9 * index, **wanted)
            for index in range(4):
                assert await sink.end(f"{place}{index}") == [FinishReason.LENGTH]
                assert len(sink.tokens(f"{place}{index}")) == 8  # none lost, none twice
            told = [entry for delta in sink.deltas[f"{place}2"] for entry in delta.prompt_logprobs or ()]
            assert len(told) == 20
            assert executor.faults == []
            assert engine.stats().num_out_of_memory == nth
            assert engine.stats().num_preemptions >= nth
            assert executor.num_emptied == 1 + (place == "apply")  # a step behind it finds that its rows never came
            assert engine.failure is None
            engine._scheduler.check()
            engine._budget.__init__(32)  # as after a long time without
            engine._budget.num_failures, engine._scheduler.token_budget = nth, 32


async def test_capturing_without_memory_is_no_failed_step(path, monkeypatch):
    """The step was computed before it was to be recorded; it is recorded another time."""
    monkeypatch.setattr("llmd.model.graphs._PATIENCE", 4)
    async with serving(path) as (engine, sink, executor):
        graphs = executor._runner._graphs
        graphs.clear()
        refused = []

        def capture(graph, work):
            refused.append(graph)
            raise torch.OutOfMemoryError("out of memory")

        graphs._capture._capture = capture
        for index in range(3):
            add(engine, f"r{index}", max_tokens=16)
        for index in range(3):
            assert await sink.end(f"r{index}") == [FinishReason.LENGTH]
        assert engine.stats().num_out_of_memory == 0
        assert 1 <= len(refused) <= 4  # and not at every step anew
        del graphs._capture._capture
        graphs._later.clear()
        async with asyncio.timeout(10):
            while not graphs._graphs:  # while there is nothing else to do
                await asyncio.sleep(0.05)


async def test_a_device_that_is_lost_is_no_lack_of_memory(path):
    async with serving(path) as (engine, sink, executor):
        executor.faults.append(("prefill", RuntimeError("CUDA error: an illegal memory access was encountered")))
        add(engine, "last")
        assert await sink.end("last") == [FinishReason.ERROR]
        assert "lost" in str(engine.failure)


@pytest.mark.parametrize("seed", range(2))
async def test_random_faults_lose_nothing(path, seed):
    """Prompts, decodes, drawn and constrained rows, and errors wherever they come: each request ends with all its tokens."""
    rng = random.Random(seed)
    async with serving(path) as (engine, sink, executor):
        for index in range(10):
            for _ in range(rng.randrange(2)):
                executor.faults.append((rng.choice(["apply", "prefill", "logits", "sampling", "decode"]), rng.choice(LACKS)))
            add(
                engine,
                f"r{index}",
                rng.randrange(1, 60),
                temperature=rng.choice([0.0, 1.0]),
                max_tokens=rng.randrange(1, 12),
            )
            if rng.random() < 0.5:
                await asyncio.sleep(0.01)
        for index in range(10):
            (reason,) = await sink.end(f"r{index}")
            if reason is FinishReason.ERROR:
                assert "no memory" in sink.deltas[f"r{index}"][-1].error
        engine._scheduler.check()
        assert engine.is_idle
        assert engine.failure is None
        assert 0 <= engine.stats().num_out_of_memory <= executor.num_emptied <= 20


def loaded(path, **cache):
    """A runner that measured, on a device of which 70 of 80 GiB are free."""
    config = ModelConfig(model=str(path), dtype="float32", device="cuda")
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32)
    runner = Runner(config, CacheConfig(block_size=4, **cache), scheduler, path, installed_parts())
    runner.info = runner.load(lambda progress: None)
    return runner


def test_a_start_measures_and_tells(path, caplog):
    with fake_cuda(), caplog.at_level(logging.INFO):
        runner = loaded(path, gpu_memory_utilization=0.5)
        rows = {row["name"]: row for row in runner.info.facts["memory"]}
        assert (rows["device"]["value"], rows["others"]["value"]) == (80 << 30, 10 << 30)
        assert rows["share"]["value"] == 40 << 30
        assert rows["KV pool"]["value"] == runner.num_blocks * runner._sizing.block_bytes
        assert rows["KV pool"]["note"].endswith("what the share leaves")
        assert rows["tokens"]["value"] == 4 * runner.num_blocks
        assert "memory of cuda:0:\n  device" in caplog.text
        beside = loaded(path)  # another model of this process, whose steps need their room too
        assert beside._sizing._promised_bytes >= runner._sizing._working_bytes
        runner.close()


@pytest.mark.parametrize("lacking", ["kv", "states"])
def test_a_wake_that_finds_no_memory_can_be_tried_again(path, monkeypatch, lacking):
    with fake_cuda():
        runner = loaded(path, kv_cache_bytes=8 << 20)
        runner.release_kv()
        assert runner.kv.pool is None
        with monkeypatch.context() as scarce:
            owner = kv_tensors if lacking == "kv" else runner.states
            scarce.setattr(owner, "zeros" if lacking == "kv" else "refill", _lacks)
            with pytest.raises(NoRoom, match=r"no 8.00 MiB for the KV pool: 70.00 GiB of|no 0.00 KiB for states of rows"):
                runner.refill_kv()
        assert runner.kv.pool is None
        runner.refill_kv()
        assert runner.kv.pool is not None
        assert runner.kv.layers


def _lacks(*_):
    raise torch.OutOfMemoryError("out of memory")
