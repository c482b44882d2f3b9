"""The executor thread does what can wait while nobody wants anything, and what fails then hurts nobody."""

import asyncio

import pytest
from model.ladder_capture import LadderCapture
from model.step_driver import model_parts
from model.tiny_models import make_model, save_model

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.params import SamplingParams
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan
from llmd.errors import EngineFailure, StepOutOfMemory
from llmd.model import executor as executors
from llmd.model.cuda_graphs import sizes_of
from llmd.model.executor import ThreadExecutor

PLAN = StepPlan(
    step_id=1, rows=[0], starts=[0], counts=[3], num_logits=[1], samples=[True], block_updates=[BlockUpdate(0, 0, 0, [0])],
    admitted=[
        RowAdmit(row=0, seq_id=0, request_id="r", token_ids=(1, 2, 3), num_prompt_tokens=3,
                 params=SamplingParams(temperature=0.0), seed=0),
    ],
)  # fmt: skip


@pytest.fixture
def executor(tmp_path, monkeypatch):
    monkeypatch.setattr("llmd.model.runner.capture_for", lambda device: LadderCapture(device))
    monkeypatch.setattr(executors, "_IDLE_S", 0.01)
    path = save_model(make_model("Llama"), tmp_path)
    config = ModelConfig(model=str(path), dtype="float32", device="cpu")
    scheduler = SchedulerConfig(max_num_seqs=40, max_num_batched_tokens=64)
    return ThreadExecutor(config, CacheConfig(block_size=4, kv_cache_bytes=8 << 20), scheduler, path, model_parts())


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def sizes(executor):
    return {size for size, _ in executor._runner._graphs._graphs}


async def test_all_sizes_are_recorded_while_there_is_nothing_else_to_do(executor):
    await executor.start(lambda progress: None)
    assert sizes(executor) >= {1, 2, 4, 8, 16, 32, 40}
    assert len((await executor.submit(PLAN)).token_ids) == 1
    await until(lambda: sizes(executor) == set(sizes_of(40)))
    assert not executor._runner.lacks_graphs
    await until(lambda: not executor._idle)
    await executor.stop()


async def test_idle_work_that_fails_is_told_and_left(executor, monkeypatch, caplog):
    def fail():
        raise ValueError("a broken layer")

    monkeypatch.setattr(executor._runner, "record_next", fail)
    await executor.start(lambda progress: None)
    await until(lambda: any("in idle time failed" in line.message for line in caplog.records))
    assert len((await executor.submit(PLAN)).token_ids) == 1
    await asyncio.sleep(0.1)
    assert sum("in idle time failed" in line.message for line in caplog.records) == 1
    await executor.stop()


async def test_a_device_that_is_lost_in_idle_time_is_lost(executor, monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(executor._runner, "record_next", fail)
    await executor.start(lambda progress: None)
    await until(lambda: executor._failure is not None)
    with pytest.raises(EngineFailure):
        await executor.submit(PLAN)
    await executor.stop()


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory"])
async def test_a_lack_of_memory_beside_torch_is_no_lost_device(executor, monkeypatch, words):
    await executor.start(lambda progress: None)
    launch = executor._runner.launch

    def fail(plan, masks=None):
        raise RuntimeError(words)

    monkeypatch.setattr(executor._runner, "launch", fail)
    with pytest.raises(StepOutOfMemory):
        await executor.submit(PLAN)
    monkeypatch.setattr(executor._runner, "launch", launch)
    assert len((await executor.submit(PLAN)).token_ids) == 1
    await executor.stop()
