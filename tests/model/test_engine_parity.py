"""The real engine over the real executor: greedy tokens stay Hugging Face's through preemption and prefix hits."""

import asyncio
import os
import threading

import pytest
from model.made_adapters import make_adapter
from model.step_driver import model_parts
from model.tiny_models import make_model, prompts, reference_generate, save_model

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.engine import Engine
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.model.executor import ThreadExecutor
from llmd_plugins.scheduling import fcfs

LENGTHS = (40, 1, 23, 57, 3, 31, 12, 48)
NUM_TOKENS = 24


class Reader:
    """Collects each request's tokens and knows when all have ended."""

    def __init__(self):
        self.tokens, self.waiting, self.done, self.errors = {}, set(), asyncio.Event(), []

    def publish(self, deltas):
        for delta in deltas:
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            self.errors += [delta.error] if delta.error else []
            if delta.finish_reason is not None:
                self.waiting.discard(delta.request_id)
        if not self.waiting:
            self.done.set()


async def run(engine, reader, requests):
    reader.tokens, reader.waiting = {}, {request.request_id for request in requests}
    reader.done.clear()
    for request in requests:
        engine.add(request)
    await asyncio.wait_for(reader.done.wait(), 60)
    assert not reader.errors
    return reader.tokens


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
async def test_greedy_tokens_through_preemption_and_prefix_hits(tmp_path, family):
    model = make_model(family)
    path = save_model(model, tmp_path)
    cache = CacheConfig(block_size=4, kv_cache_bytes=60 * 3 * 2 * 4 * 40 * 4)  # 60 blocks: less than all need at once
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=37)
    executor = ThreadExecutor(
        ModelConfig(model="tiny", device="cpu", dtype="float32", max_model_len=100), cache, scheduler, path, model_parts()
    )
    reader = Reader()
    [policy] = fcfs.llmd_register_scheduling_policies()
    engine = Engine(executor, scheduler, cache, waiting=policy.build(scheduler), publish=reader.publish)
    info = await engine.start(lambda progress: None)
    assert info.num_blocks == 60
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    given = prompts(*LENGTHS)
    expected = {
        str(index): reference_generate(model, prompt, NUM_TOKENS)[len(prompt) :] for index, prompt in enumerate(given)
    }
    requests = [
        Request(request_id=str(index), prompt=Prompt(tuple(prompt)), params=params) for index, prompt in enumerate(given)
    ]
    assert await run(engine, reader, requests) == expected
    assert engine.stats().num_preemptions > 0
    again = [requests[0], requests[3]]
    assert await run(engine, reader, again) == {"0": expected["0"], "3": expected["3"]}
    hits = engine.stats().prefix_hits
    assert await run(engine, reader, again) == {"0": expected["0"], "3": expected["3"]}
    assert engine.stats().prefix_hits > hits
    await engine.stop()


async def test_adapters_through_the_engine_equal_their_merged_models(tmp_path):
    """More adapters than slots, a tight pool, prefix hits: every request still gets its own model's tokens."""
    model = make_model("Qwen2")
    path = save_model(model, tmp_path / "base")
    made = {f"a{index}": make_adapter(model, tmp_path / f"a{index}", rank=4 * (index + 1), seed=index) for index in range(5)}
    cache = CacheConfig(block_size=4, kv_cache_bytes=60 * 3 * 2 * 4 * 40 * 4)
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=37, adapter_drain_threshold=1)
    config = ModelConfig(model="tiny", device="cpu", dtype="float32", max_model_len=100)
    executor = ThreadExecutor(config, cache, scheduler, path, model_parts(max_loras=2, max_lora_rank=32, max_cpu_loras=3))
    reader = Reader()
    [policy] = fcfs.llmd_register_scheduling_policies()
    engine = Engine(executor, scheduler, cache, waiting=policy.build(scheduler), publish=reader.publish)
    await engine.start(lambda progress: None)
    for name, adapter in made.items():
        engine.adapter_store.declare(name, str(adapter.path))
    models = {None: model, **{name: adapter.merged.eval() for name, adapter in made.items()}}
    params = SamplingParams(temperature=0.0, max_tokens=8)
    given = prompts(21, 21)
    requests, expected = [], {}
    for turn in range(2):
        for name, merged in models.items():
            for index, prompt in enumerate(given):
                request_id = f"{name}-{index}-{turn}"
                requests.append(Request(request_id=request_id, prompt=Prompt(tuple(prompt)), params=params, adapter=name))
                expected[request_id] = reference_generate(merged, prompt, 8)[len(prompt) :]
    assert await run(engine, reader, requests[:12]) == {name: expected[name] for name in list(expected)[:12]}
    hits = engine.stats().prefix_hits
    assert await run(engine, reader, requests[12:]) == {name: expected[name] for name in list(expected)[12:]}
    assert engine.stats().prefix_hits > hits
    assert len({tuple(tokens) for tokens in expected.values()}) > 6
    await engine.adapter_store.unload("a0")
    assert not engine.adapter_store.has("a0")
    await engine.stop()


async def test_a_thousand_loads_leave_no_file_thread_or_slot_behind(tmp_path):
    model = make_model("Llama", num_hidden_layers=1)
    path = save_model(model, tmp_path / "base")
    made = make_adapter(model, tmp_path / "a", rank=2, targets=("q_proj",))
    cache = CacheConfig(block_size=4, kv_cache_bytes=1 << 20)
    scheduler = SchedulerConfig(max_num_seqs=4)
    config = ModelConfig(model="tiny", device="cpu", dtype="float32", max_model_len=64)
    executor = ThreadExecutor(config, cache, scheduler, path, model_parts(max_loras=2, max_lora_rank=2))
    reader = Reader()
    [policy] = fcfs.llmd_register_scheduling_policies()
    engine = Engine(executor, scheduler, cache, waiting=policy.build(scheduler), publish=reader.publish)
    await engine.start(lambda progress: None)
    [prompt] = prompts(5)
    params = SamplingParams(temperature=0.0, max_tokens=2)
    store, counts = engine.adapter_store, []
    for turn in range(1000):
        await store.load("a", str(made.path))
        if turn % 100 == 10:
            request = Request(request_id=str(turn), prompt=Prompt(tuple(prompt)), params=params, adapter="a")
            assert await run(engine, reader, [request])
            counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        await store.unload("a")
    await executor.ping()
    assert len(set(counts[1:])) == 1
    assert store.list() == []
    assert executor._runner.adapters._host == {}
    await engine.stop()
