"""Sequences of one request that copy their sibling's last block say what requests of their own would say."""

import asyncio
import contextlib

import numpy as np
import pytest
import torch
from model.fake_cuda import fake_cuda
from model.made_adapters import make_adapter
from model.step_driver import model_parts
from model.test_engine_parity import Reader
from model.tiny_models import make_model, prompts, save_model

from llmd.api.v1.testing.driver import installed_parts
from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.engine import Engine
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import BlockCopy, BlockUpdate, RowAdmit, StepPlan
from llmd.model.executor import ThreadExecutor
from llmd.model.graphs import DecodeGraphs
from llmd.model.kv_tensors import KVTensors
from llmd.model.runner import Runner
from llmd_kernels import native
from llmd_plugins.scheduling import fcfs

NUM_TOKENS = 14
DRAWN = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}
WAYS = {
    "greedy": ({}, {}, {"temperature": 0.0}),
    "drawn": ({}, {}, DRAWN),
    "penalties": ({}, {}, {**DRAWN, "presence_penalty": 0.6, "repetition_penalty": 1.3}),
    "without prefix caching": ({"enable_prefix_caching": False}, {}, DRAWN),
    "chunked prompts": ({}, {"max_num_batched_tokens": 11}, DRAWN),
    "preempted": ({"kv_cache_bytes": 15 * 3 * 2 * 4 * 40 * 4}, {"max_num_batched_tokens": 37, "watermark": 0.0}, DRAWN),
    "int8": ({"kv_cache_dtype": "int8"}, {}, DRAWN),
    "fp8": ({"kv_cache_dtype": "fp8"}, {"max_num_batched_tokens": 11}, DRAWN),
    "few rows": ({}, {"max_num_seqs": 2}, DRAWN),
}


@pytest.fixture(scope="module")
def model():
    return make_model("Qwen3")


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp("model"))


class Tokens(Reader):
    """Collects each sequence's tokens."""

    def publish(self, deltas):
        for delta in deltas:
            self.tokens.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
            self.errors += [delta.error] if delta.error else []
            if delta.finish_reason is not None:
                self.waiting.discard((delta.request_id, delta.index))
        if not self.waiting:
            self.done.set()

    async def of(self, engine, requests):
        self.tokens, self.waiting = {}, {(entry.request_id, index) for entry in requests for index in range(entry.params.n)}
        self.done.clear()
        for request in requests:
            engine.add(request)
        await asyncio.wait_for(self.done.wait(), 60)
        assert not self.errors
        return self.tokens


@contextlib.asynccontextmanager
async def serving(path, cache=None, scheduler=None, dtype="float32", **adapters):
    """An engine, what it says, and the plans that it hands over."""
    cache = CacheConfig(**{"block_size": 4, "kv_cache_bytes": 4 << 20, **(cache or {})})
    scheduler = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **(scheduler or {})})
    config = ModelConfig(model="tiny", device="cpu", dtype=dtype, max_model_len=60)
    executor = ThreadExecutor(config, cache, scheduler, path, model_parts(**adapters))
    plans, submit, reader = [], executor.submit, Tokens()
    executor.submit = lambda plan, masks=None: plans.append(plan) or submit(plan, masks)
    [policy] = fcfs.llmd_register_scheduling_policies()
    engine = Engine(executor, scheduler, cache, waiting=policy.build(scheduler), publish=reader.publish)
    await engine.start(lambda progress: None)
    try:
        yield engine, reader, plans
    finally:
        await engine.stop()


def together(prompt, params, **changes):
    return Request(request_id="all", prompt=Prompt(tuple(prompt)), params=SamplingParams(n=4, **params), **changes)


def alone(prompt, params, **changes):
    """The same as requests that share nothing."""
    return [
        Request(
            request_id=str(index),
            prompt=Prompt(tuple(prompt)),
            params=SamplingParams(**{**params, "seed": params["seed"] + index}),
            namespace=str(index).encode(),
            **changes,
        )
        for index in range(4)
    ]


@pytest.mark.parametrize(("cache", "scheduler", "sampling"), WAYS.values(), ids=WAYS)
async def test_four_sequences_say_what_four_requests_say(path, cache, scheduler, sampling):
    params = {"max_tokens": NUM_TOKENS, "seed": 5, "ignore_eos": True, **sampling}
    for length in (23, 24):  # a block that is partly filled, and one that is full
        [prompt] = prompts(length)
        async with serving(path, cache, scheduler) as (engine, reader, plans):
            said = dict(await reader.of(engine, [together(prompt, params)]))
            copies = [copy for plan in plans for copy in plan.block_copies]
            is_tight = engine.info.num_blocks < 20
            assert (engine.stats().num_preemptions > 0) == is_tight
            assert len(copies) == 3 or (is_tight and copies)
            expected = await reader.of(engine, alone(prompt, params))
        assert [said["all", index] for index in range(4)] == [expected[str(index), 0] for index in range(4)]
        assert len(said["all", 0]) == NUM_TOKENS


async def test_siblings_begin_with_the_adapter_that_they_share(model, path, tmp_path):
    made = make_adapter(model, tmp_path / "a", rank=4, seed=1)
    params = {"max_tokens": NUM_TOKENS, "seed": 5, "ignore_eos": True, **DRAWN}
    [prompt] = prompts(23)
    async with serving(path, max_loras=1, max_lora_rank=4) as (engine, reader, plans):
        engine.adapter_store.declare("a", str(made.path))
        said = dict(await reader.of(engine, [together(prompt, params, adapter="a")]))
        assert sum(len(plan.block_copies) for plan in plans) == 3
        expected = await reader.of(engine, alone(prompt, params, adapter="a"))
        plain = await reader.of(engine, alone(prompt, params))
    assert [said["all", index] for index in range(4)] == [expected[str(index), 0] for index in range(4)]
    assert expected != plain


@pytest.mark.skipif(native.library() is None, reason="no compiler: nothing is recorded on a CPU")
async def test_after_the_first_prefill_every_step_is_replayed(path, monkeypatch):
    replayed, run = [], DecodeGraphs.run
    monkeypatch.setattr(DecodeGraphs, "run", lambda self, plan, key: replayed.append(plan) or run(self, plan, key))
    [prompt] = prompts(23)
    async with serving(path, dtype="bfloat16") as (engine, reader, plans):
        replayed.clear()  # those of the warm-up
        await reader.of(engine, [together(prompt, {"max_tokens": 6, "seed": 1, "ignore_eos": True})])
    first, *others = [plan for plan in plans if plan.rows]
    assert list(first.counts) == [23]
    assert {count for plan in others for count in plan.counts} == {1}
    assert [plan for plan in others if plan.block_copies]
    assert replayed == others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_copied_block_holds_all_layers_and_their_scales(dtype):
    kv = KVTensors(6, 3, (2, 4, 2, 6), dtype, torch.device("cpu"))
    kv.pool.view(torch.uint8).random_()
    before = kv.pool.clone()
    kv.copy([BlockCopy(1, 4), BlockCopy(1, 0)])
    for block, source in enumerate((1, 1, 2, 3, 1, 5)):
        assert np.array_equal(kv.pool[block].view(torch.uint8).numpy(), before[source].view(torch.uint8).numpy())
    kv.copy([])
    kv.release()
    kv.copy([BlockCopy(1, 4)])  # asleep: nothing is there to copy
    assert kv.pool is None


def test_on_a_gpu_a_copy_waits_for_nothing_and_the_step_is_replayed(path):
    pytest.importorskip("triton")
    with fake_cuda(compiles=True) as device:
        config = ModelConfig(model=str(path), dtype="float32", device="cuda")
        cache = CacheConfig(block_size=4, kv_cache_bytes=1 << 20)
        scheduler = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
        runner = Runner(config, cache, scheduler, path, installed_parts())
        runner.load(lambda progress: None)
        runner.launch(begun(0, [*range(6)], 0, 6)).result()
        device.clear()
        pending = runner.launch(begun(1, [0, 9], 5, 1, block_copies=[BlockCopy(1, 9)]))
        assert device.waits == []
        assert device.launches[:2] == ["copy_words", "replay"]
        assert "prefill" not in device.launches
        assert len(pending.result().token_ids) == 1
        assert device.waits == ["event"]


def begun(row, blocks, start, count, **changes):
    """A plan that gives a row its sequence of six tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=9)
    admit = RowAdmit(
        row=row, seq_id=row, request_id="", token_ids=tuple(range(6)), num_prompt_tokens=6, params=params, seed=0
    )
    return StepPlan(
        step_id=row, admitted=[admit], block_updates=[BlockUpdate(row, 0, 0, blocks)], rows=[row], starts=[start],
        counts=[count], num_logits=[1], samples=[True], **changes,
    )  # fmt: skip
