"""The executor thread: order, answers on the loop, failures of one step and of the device."""

import asyncio
import logging
import os
import threading

import pytest
import torch
from model.step_driver import GREEDY, model_parts
from model.tiny_models import VOCAB_SIZE, make_model, prompts, reference_generate, save_model

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan
from llmd.errors import EngineFailure, ModelError, StepFailed
from llmd.model import executor as executor_module
from llmd.model.bandwidth import ReadProbe
from llmd.model.executor import _Job
from llmd_plugins.executors import thread


@pytest.fixture(scope="module")
def model():
    return make_model("Llama")


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp("model"))


def build(path, **model):
    [spec] = thread.llmd_register_executors()
    return spec.build(
        ModelConfig(model="tiny", device="cpu", **model),
        path=path,
        cache=CacheConfig(block_size=4, kv_cache_bytes=1 << 20),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
        parts=model_parts(),
    )


@pytest.fixture
async def executor(path):
    executor = build(path)
    executor.reports = []
    executor.info = await executor.start(executor.reports.append)
    yield executor
    await executor.stop()


def admit(prompt, row=0):
    return RowAdmit(
        row=row, seq_id=1, request_id="r", token_ids=prompt, num_prompt_tokens=len(prompt), params=GREEDY, seed=0
    )


def first_step(prompt, row=0, block=0):
    blocks = BlockUpdate(row, 0, 0, range(block, block + 16))
    return StepPlan(
        step_id=0, admitted=[admit(prompt, row)], block_updates=[blocks], rows=[row], starts=[0], counts=[len(prompt)],
        num_logits=[1], samples=[True],
    )  # fmt: skip


def decode(position, row=0):
    return StepPlan(step_id=position, rows=[row], starts=[position], counts=[1], num_logits=[1], samples=[True])


async def test_start_reports_on_the_loop_and_says_what_it_offers(executor):
    assert [report.fraction for report in executor.reports] == sorted(report.fraction for report in executor.reports)
    assert executor.reports[-1].fraction == 1.0
    info = executor.info
    assert info.vocab_size == VOCAB_SIZE
    assert info.max_model_len == 256
    assert info.max_num_seqs == 4
    assert info.num_blocks * info.block_size >= info.max_model_len
    assert info.kv_bytes <= 1 << 20
    assert info.attention_backend == "cpu"


async def test_steps_in_flight_read_the_token_just_sampled(executor, model):
    prompt = prompts(9)[0]
    answers = [executor.submit(first_step(prompt))]
    tokens = []
    for position in range(9, 14):  # always one ahead of what is known
        answers.append(executor.submit(decode(position)))
        tokens += (await answers.pop(0)).token_ids
    tokens += (await answers.pop(0)).token_ids
    assert prompt + tokens == reference_generate(model, prompt, 6)


async def test_a_failing_step_fails_alone(executor, model, monkeypatch):
    prompt = prompts(5)[0]
    bad = StepPlan(step_id=1, rows=[0], starts=[10**6], counts=[1], num_logits=[1], samples=[True])
    first, second, third = executor.submit(bad), executor.submit(first_step(prompt)), executor.submit(decode(5))
    with pytest.raises(StepFailed):
        await first
    tokens = [*(await second).token_ids, *(await third).token_ids]
    assert prompt + tokens == reference_generate(model, prompt, 2)
    assert await executor.ping() >= 0


async def test_a_failed_step_has_still_admitted(executor, model, monkeypatch):
    prompt = prompts(5)[0]
    plan = first_step(prompt)
    inner = executor._runner.forward
    monkeypatch.setattr(executor._runner, "forward", lambda batch: 1 / 0)
    with pytest.raises(StepFailed, match="ZeroDivisionError"):
        await executor.submit(plan)
    monkeypatch.setattr(executor._runner, "forward", inner)
    again = StepPlan(step_id=2, rows=[0], starts=[0], counts=[5], num_logits=[1], samples=[True])
    assert prompt + (await executor.submit(again)).token_ids == reference_generate(model, prompt, 1)


async def test_a_lost_device_ends_everything(executor, monkeypatch):
    def lost(batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(executor._runner, "forward", lost)
    first, second = executor.submit(first_step([1, 2])), executor.submit(decode(2))
    for answer in (first, second, executor.submit(decode(3))):
        with pytest.raises(EngineFailure):
            await answer
    with pytest.raises(EngineFailure):
        await executor.ping()


async def test_a_dead_thread_answers_everybody(executor, monkeypatch):
    def die(job):
        raise SystemExit

    monkeypatch.setattr(executor, "_launch", die)
    first, second = executor.submit(decode(1)), executor.submit(decode(2))
    for answer in (first, second):
        with pytest.raises(EngineFailure):
            await answer
    with pytest.raises(EngineFailure):
        await executor.submit(decode(3))


async def test_stop_finishes_what_is_queued_and_may_come_twice(path):
    executor = build(path)
    await executor.start(lambda progress: None)
    answer = executor.submit(first_step([1, 2, 3]))
    await asyncio.gather(executor.stop(), executor.stop())
    assert len((await answer).token_ids) == 1
    await executor.stop()
    with pytest.raises(EngineFailure, match="stopped"):
        await executor.submit(decode(3))
    assert not any(thread.name == "llmd-executor" for thread in threading.enumerate())


async def test_stop_before_start(path):
    await build(path).stop()


async def test_a_model_that_cannot_be_loaded_says_why(path):
    executor = build(path, max_model_len=100_000)
    with pytest.raises(ModelError, match="max_model_len"):
        await executor.start(lambda progress: None)
    await executor.stop()


async def test_an_abandoned_answer_harms_nobody(executor):
    executor.submit(first_step([1, 2, 3])).cancel()
    assert await executor.ping() >= 0


async def test_the_configuration_says_how_many_threads(path, caplog):
    first = min(os.sched_getaffinity(0))
    executor = build(path, cpu_threads=1, cpu_affinity=str(first))
    with caplog.at_level(logging.INFO, "llmd.model"):
        info = await executor.start(lambda progress: None)
    allowed = await executor._submit(_Job(asyncio.get_running_loop().create_future(), lambda: os.sched_getaffinity(0)))
    await executor.stop()
    assert info.facts["cpu_threads"] == 1
    assert allowed == {first}
    assert os.sched_getaffinity(0) != set() if len(os.sched_getaffinity(0)) == 1 else os.sched_getaffinity(0) != allowed
    assert f"CPU: 1 thread pinned to CPUs {first} (cpu_affinity)" in caplog.messages


async def test_cpus_that_are_not_ours_are_refused(path):
    executor = build(path, cpu_affinity="8190")
    with pytest.raises(ModelError, match="cpu_affinity names CPUs 8190, which this process may not use"):
        await executor.start(lambda progress: None)
    await executor.stop()


async def test_what_can_wait_is_done_when_there_is_nothing_to_do(path, monkeypatch):
    """The bandwidth is measured in slices between pings; a step that comes is answered."""
    monkeypatch.setattr(executor_module, "_IDLE_S", 0.02)
    monkeypatch.setattr(executor_module, "_SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(executor_module, "cache_bytes", lambda: 0)
    monkeypatch.setattr(executor_module, "ReadProbe", lambda: ReadProbe(64 << 20))
    executor = build(path)
    info = await executor.start(lambda progress: None)
    assert info.facts["memory_bandwidth"] is None
    assert len((await executor.submit(first_step([1, 2, 3]))).token_ids) == 1
    for _ in range(200):
        if info.facts["memory_bandwidth"] is not None:
            break
        await executor.ping()
        await asyncio.sleep(0.02)
    assert 1e7 < info.facts["memory_bandwidth"] < 1e13
    assert not executor._idle
    assert len((await executor.submit(decode(3))).token_ids) == 1
    await executor.stop()


def test_only_lost_devices_count_as_lost():
    assert executor_module.is_device_lost(RuntimeError("CUDA error: device-side assert triggered"))
    assert not executor_module.is_device_lost(torch.OutOfMemoryError("CUDA out of memory"))
    assert not executor_module.is_device_lost(IndexError("index out of range"))
