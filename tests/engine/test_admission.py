"""Keys before the engine: whose requests may wait, what a Retry-After says, and a queue that is replaced."""

from __future__ import annotations

import asyncio

import pytest
from fakes import FakeExecutor, fake_info, greedy

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.engine import Engine
from llmd.engine.queue import Share
from llmd.engine.request import Prompt, Request
from llmd.errors import Overloaded
from llmd_plugins.scheduling.fair import FairQueue
from llmd_plugins.scheduling.fcfs import FcfsQueue


async def test_a_retry_after_is_what_the_queue_takes_at_the_rate_of_the_last_steps():
    config = SchedulerConfig(max_waiting_requests=3, max_num_batched_tokens=16, max_num_seqs=1)
    executor = FakeExecutor(fake_info(max_num_seqs=1), step_s=0.02)
    engine = Engine(executor, config, CacheConfig(), waiting=FairQueue(30.0), publish=lambda deltas: None)
    await engine.start(lambda progress: None)
    for index in range(4):
        prompt = Prompt(tuple(range(index, index + 64)))
        engine.add(Request(request_id=f"r{index}", prompt=prompt, params=greedy(max_tokens=20), key=f"k{index}"))
        await asyncio.sleep(0.1)
    with pytest.raises(Overloaded) as refused:
        engine.check_admission(64)
    rate = engine._counters.prefill_rate
    assert 100 < rate <= 16 / 0.02  # at most a full step each 20 ms
    assert refused.value.retry_after_s == pytest.approx(max(1.0, engine._scheduler.num_waiting_tokens / rate))
    await engine.stop()


async def test_a_flooding_key_leaves_room_in_the_queue_for_others():
    config = SchedulerConfig(max_waiting_requests=10)
    engine = Engine(FakeExecutor(fake_info(), step_s=9.0), config, CacheConfig(), waiting=FairQueue(30.0), publish=print)
    await engine.start(lambda progress: None)

    def send(number, key):
        engine.add(Request(request_id=f"{key}{number}", prompt=Prompt((1, 2)), params=greedy(max_tokens=2), key=key))

    for number in range(8):
        send(number, "flood")
    with pytest.raises(Overloaded, match="8 requests of key 'flood' are waiting, the rest of the queue is for others"):
        send(8, "flood")
    send(0, "web")
    send(1, "other")
    with pytest.raises(Overloaded, match="10 requests are waiting"):
        send(0, "late")
    engine.set_shares({"flood": Share(0.5)})
    await engine.stop()


async def test_the_queue_is_replaced_while_idle():
    engine = Engine(FakeExecutor(), SchedulerConfig(), CacheConfig(), waiting=FairQueue(30.0), publish=lambda deltas: None)
    await engine.start(lambda progress: None)
    assert engine.is_idle
    changed = SchedulerConfig(policy="fcfs", watermark=0.5, max_num_seqs=3)
    engine.replace_queue(changed, FcfsQueue())
    engine.add(Request(request_id="r", prompt=Prompt((1, 2)), params=greedy(max_tokens=2)))
    assert not engine.is_idle
    assert engine.stats().num_waiting == 1
    assert engine._config.max_num_seqs == SchedulerConfig().max_num_seqs
    await engine.stop(drain_s=1.0)
    assert engine._scheduler.num_finished == 1


async def test_keys_that_share_a_slow_device_wait_for_one_step_at_most():
    for keys, step_s, depth in (("ab", 0.04, 1), ("aa", 0.04, 2), ("ab", 0.004, 2)):
        executor = FakeExecutor(step_s=step_s)
        engine = Engine(executor, SchedulerConfig(), CacheConfig(), waiting=FairQueue(30.0), publish=lambda deltas: None)
        await engine.start(lambda progress: None)
        for index, key in enumerate(keys):
            params = greedy(max_tokens=60, ignore_eos=True)
            engine.add(Request(request_id=f"r{index}", prompt=Prompt((1, 2)), params=params, key=key))
        while engine.stats().num_steps < 15:
            await asyncio.sleep(0.01)
        executor.max_outstanding = 0
        await asyncio.sleep(0.1)
        await engine.stop(drain_s=5.0)
        assert executor.max_outstanding == depth, keys
        assert engine._scheduler.num_finished == 2
