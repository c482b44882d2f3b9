"""The executor thread: order, answers on the loop, failures of one step and of the device."""

import asyncio
import threading

import pytest
import torch
from model.step_driver import GREEDY, model_parts
from model.tiny_models import VOCAB_SIZE, make_model, prompts, reference_generate, save_model

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan
from llmd.errors import EngineFailure, ModelError, StepFailed
from llmd.model import executor as executor_module
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


def test_threads_leave_a_core_to_the_loop(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(executor_module, "_cgroup_cores", lambda: None)
    for cores, expected in ((1, 1), (2, 2), (3, 2), (8, 7)):
        monkeypatch.setattr(executor_module.os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        assert executor_module.num_threads() == expected
    monkeypatch.setattr(executor_module, "_cgroup_cores", lambda: 2)
    assert executor_module.num_threads() == 2


def test_only_lost_devices_count_as_lost():
    assert executor_module.is_device_lost(RuntimeError("CUDA error: device-side assert triggered"))
    assert not executor_module.is_device_lost(torch.OutOfMemoryError("CUDA out of memory"))
    assert not executor_module.is_device_lost(IndexError("index out of range"))
