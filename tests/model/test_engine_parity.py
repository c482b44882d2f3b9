"""The real engine over the real executor: greedy tokens stay Hugging Face's through preemption and prefix hits."""

import asyncio

import pytest
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
