"""Adapters through the step loop: loaded beside it, waited for, refused, replaced, drained, shared out fairly."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

import pytest
from engine.driving import request, running
from fakes import FakeDevice, FakeExecutor, expected_tokens, fake_info

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.adapter_slots import AdapterSlots, AdapterState
from llmd.engine.executor import AdapterFacts
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.scheduler import Scheduler
from llmd.engine.step import FinishReason
from llmd.errors import AdapterError, AdapterNotFound, InvalidRequest, ModelNotFound, NotReady
from llmd_plugins.scheduling.fair import FairQueue
from llmd_plugins.scheduling.fcfs import FcfsQueue

PROMPT = list(range(1, 11))


def with_adapters(max_loras=2, max_cpu_loras=4, **changes):
    """An engine over a fake device with slots."""
    return running(FakeExecutor(fake_info(max_loras=max_loras, max_cpu_loras=max_cpu_loras, **changes)))


def ask(name, adapter, **changes):
    """A request of ten tokens."""
    return request(name, length=10, adapter=adapter, **changes)


async def test_base_and_adapters_run_together_each_as_its_files_say():
    async with with_adapters() as (engine, sink, _):
        for name in "ab":
            info = await engine.adapter_store.load(name, f"/{name}")
            assert (info.state, info.rank, info.num_loads) == (AdapterState.LOADED, 8, 1)
        for name in (None, "a", "b"):
            engine.add(ask(str(name), name))
        for name, path in ((None, None), ("a", "/a"), ("b", "/b")):
            assert await sink.end(str(name)) == [FinishReason.LENGTH]
            assert sink.tokens(str(name)) == expected_tokens(PROMPT, 6, 1000, adapter=path)


async def test_a_request_waits_for_its_files_while_others_go_on():
    async with with_adapters() as (engine, sink, executor):
        executor.load_s = 0.2
        engine.adapter_store.declare("slow", "/slow")
        (waiting,) = engine.add(ask("slow", "slow"))
        assert waiting.state.value == "loading"
        engine.add(ask("base", None))
        assert await sink.end("base") == [FinishReason.LENGTH]
        assert waiting.state.value == "loading"
        assert engine.adapter_store.list()[0].state == AdapterState.LOADING
        assert await sink.end("slow") == [FinishReason.LENGTH]
        assert sink.tokens("slow") == expected_tokens(PROMPT, 6, 1000, adapter="/slow")
        (info,) = engine.adapter_store.list()
        assert (info.num_requests, info.num_loads, info.num_slot_loads) == (1, 1, 1)
        assert 0.15 < info.wait_s < 5


async def test_files_that_cannot_be_used_refuse_their_requests_only():
    async with with_adapters() as (engine, sink, executor):
        executor.broken_adapters = {"/bad"}
        engine.adapter_store.declare("bad", "/bad")
        for name, adapter in (("first", "bad"), ("base", None), ("second", "bad")):
            engine.add(ask(name, adapter))
        assert await sink.end("base") == [FinishReason.LENGTH]
        for name in ("first", "second"):
            assert await sink.end(name) == [FinishReason.REFUSED]
            assert sink.deltas[name][-1].error == "adapter 'bad' cannot be loaded: tensor a of /bad is missing"
        executor.broken_adapters = set()  # the files were mended
        engine.add(ask("again", "bad"))
        assert await sink.end("again") == [FinishReason.LENGTH]


async def test_a_load_that_fails_leaves_nothing_and_a_name_is_taken_once():
    async with with_adapters() as (engine, _, executor):
        store = engine.adapter_store
        executor.broken_adapters = {"/bad"}
        with pytest.raises(AdapterError, match="tensor a"):
            await store.load("a", "/bad")
        assert store.list() == []
        await store.load("a", "/a")
        with pytest.raises(AdapterError, match="in place"):
            await store.load("a", "/other")
        with pytest.raises(AdapterError, match="tensor a"):
            await store.load("a", "/bad", replace=True)
        assert [info.path for info in store.list()] == ["/a"]
        both = await asyncio.gather(store.load("b", "/b"), store.load("b", "/b"), return_exceptions=True)
        assert isinstance(both[1], AdapterError)
        with pytest.raises(AdapterNotFound):
            await store.unload("c")
        assert issubclass(AdapterNotFound, ModelNotFound)
        with pytest.raises(AdapterError, match="characters"):
            await store.load("x\n", "/x")


async def test_unknown_names_and_engines_without_slots_are_told():
    async with with_adapters() as (engine, _, _):
        with pytest.raises(InvalidRequest, match="no adapter is named 'nobody'"):
            engine.add(ask("r", "nobody"))
    async with running() as (engine, _, _):
        assert not engine.adapter_store.is_enabled
        with pytest.raises(AdapterError, match="enable_lora"):
            await engine.adapter_store.load("a", "/a")


async def test_unloading_drains_and_replacing_keeps_those_under_way():
    async with with_adapters(max_loras=2) as (engine, sink, executor):
        store = engine.adapter_store
        executor.step_s = 0.002
        await store.load("a", "/one")
        engine.add(ask("old", "a", sampling={"max_tokens": 40}))
        await asyncio.sleep(0.02)
        await store.load("a", "/two", replace=True)
        engine.add(ask("new", "a", sampling={"max_tokens": 40}))
        unloading = asyncio.create_task(store.unload("a"))
        await asyncio.sleep(0.01)
        assert not unloading.done()
        with pytest.raises(InvalidRequest):
            engine.add(ask("late", "a"))
        assert {info.state for info in store.list()} == {AdapterState.DRAINING}
        await unloading
        assert await sink.end("new") == [FinishReason.LENGTH]
        assert await sink.end("old") == [FinishReason.LENGTH]
        assert sink.tokens("old") == expected_tokens(PROMPT, 40, 1000, adapter="/one")
        assert sink.tokens("new") == expected_tokens(PROMPT, 40, 1000, adapter="/two")
        assert store.list() == []
        await asyncio.sleep(0.01)
        assert executor.device.adapters == {}


async def test_a_deadline_passes_while_files_are_read():
    async with with_adapters() as (engine, sink, executor):
        executor.load_s = 5.0
        engine.adapter_store.declare("a", "/a")
        loop = asyncio.get_running_loop()
        engine.add(ask("r", "a", deadline_s=loop.time() + 0.05))
        assert await asyncio.wait_for(sink.end("r"), 2) == [FinishReason.TIMEOUT]


async def test_host_memory_keeps_the_most_recent():
    async with with_adapters(max_loras=1, max_cpu_loras=2) as (engine, sink, executor):
        for name in "abc":
            engine.adapter_store.declare(name, f"/{name}")
        for turn, name in enumerate("abacab"):
            engine.add(ask(f"{turn}", name))
            assert await sink.end(f"{turn}") == [FinishReason.LENGTH]
            assert sink.tokens(f"{turn}") == expected_tokens(PROMPT, 6, 1000, adapter=f"/{name}")
        assert executor.adapters_read == ["/a", "/b", "/c", "/b"]


async def test_what_a_step_puts_into_a_slot_is_dropped_after_it():
    async with with_adapters(max_loras=3, max_cpu_loras=1) as (engine, sink, executor):
        executor.step_s = 0.001
        for name in "abcde":
            engine.adapter_store.declare(name, f"/{name}")
            engine.add(ask(name, name, sampling={"max_tokens": 9}))
        for name in "abcde":
            assert await sink.end(name) == [FinishReason.LENGTH]
            assert sink.tokens(name) == expected_tokens(PROMPT, 9, 1000, adapter=f"/{name}")
        assert sum(info.num_evictions for info in engine.adapter_store.list()) >= 2


async def test_a_thousand_loads_leave_nothing_behind():
    async with with_adapters(max_loras=2, max_cpu_loras=3) as (engine, sink, executor):
        store = engine.adapter_store
        for turn in range(1000):
            await store.load("a", f"/{turn}", replace=turn % 3 == 0)
            if turn % 50 == 0:
                engine.add(ask(f"r{turn}", "a"))
                assert await sink.end(f"r{turn}") == [FinishReason.LENGTH]
            await store.unload("a")
        slots = engine._scheduler.adapters
        assert store.list() == []
        assert (slots._slots, slots._entries, slots._live) == ([None, None], {}, {})
        assert executor.device.adapters == {}


async def test_who_waits_for_files_hears_that_the_engine_stops():
    async with with_adapters() as (engine, sink, executor):
        executor.load_s = 60.0
        loading = asyncio.create_task(engine.adapter_store.load("a", "/a"))
        engine.adapter_store.declare("b", "/b")
        engine.add(ask("r", "b"))
        await asyncio.sleep(0.01)
    with pytest.raises(NotReady):
        await loading
    assert await sink.end("r") == [FinishReason.ABORT]


class Crowd:
    """Clients of equal demand over a scheduler and a fake device: each asks again as soon as it is answered."""

    def __init__(self, num_adapters, num_slots, *, clients, num_rows, threshold, max_tokens, waiting=None):
        info = fake_info(
            num_blocks=num_rows * 16, max_num_seqs=num_rows, max_loras=num_slots, max_cpu_loras=num_adapters, vocab_size=50
        )
        config = SchedulerConfig(max_num_seqs=num_rows, adapter_drain_threshold=threshold)
        self.scheduler = Scheduler(config, CacheConfig(block_size=4), info, waiting or FcfsQueue())
        self.device, self.max_tokens = FakeDevice(info), max_tokens
        self.served: Counter[str] = Counter()
        self.names = [f"a{index}" for index in range(num_adapters)]
        adapters = self.scheduler.adapters
        for name in self.names:
            entry = adapters.make(name, name)
            adapters.publish(entry)
            adapters.want(entry)
        for entry in adapters.take_reads():
            self.device.adapters[entry.adapter_id] = entry.path
            adapters.loaded(entry, AdapterFacts(8, 1))
        self.in_flight: deque = deque()
        self.count = 0
        for _ in range(clients):
            for name in self.names:
                self.ask(name)

    def ask(self, name):
        self.count += 1
        prompt = Prompt((self.count % 50, 1 + self.count % 7))
        params = SamplingParams(temperature=0.0, max_tokens=1 + self.count % self.max_tokens)
        self.scheduler.add(Request(request_id=f"{name}:{self.count}", prompt=prompt, params=params, adapter=name), 0)

    def run(self, steps):
        for turn in range(steps):
            step = self.scheduler.schedule(0.0)
            if step is not None:
                self.in_flight.append((step, self.device.run(step.plan)))
            if len(self.in_flight) == 2 or step is None:
                for delta in self.scheduler.commit(*self.in_flight.popleft()):
                    name = delta.request_id.partition(":")[0]
                    self.served[name] += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        assert delta.finish_reason is FinishReason.LENGTH
                        self.ask(name)
            if turn % 500 == 0:
                self.scheduler.check()


@pytest.mark.parametrize(("num_rows", "clients", "threshold", "queue"), [(32, 2, 4, FcfsQueue), (16, 5, 16, FairQueue)])
def test_64_adapters_share_8_slots_fairly(num_rows, clients, threshold, queue):
    waiting = queue() if queue is FcfsQueue else queue(30.0)
    crowd = Crowd(64, 8, clients=clients, num_rows=num_rows, threshold=threshold, max_tokens=12, waiting=waiting)
    crowd.run(3000)
    least, most = min(crowd.served[name] for name in crowd.names), max(crowd.served.values())
    assert least > 100
    assert most / least <= 2


def test_nobody_drains_while_slots_suffice():
    crowd = Crowd(8, 8, clients=2, num_rows=16, threshold=1, max_tokens=6)
    crowd.run(200)
    assert sum(info.num_evictions for info in crowd.scheduler.adapters.infos()) == 0
    assert [info.num_slot_loads for info in crowd.scheduler.adapters.infos()] == [1] * 8


def test_one_that_never_lets_go_gives_way_to_one_that_waits():
    crowd = Crowd(2, 1, clients=0, num_rows=4, threshold=3, max_tokens=8)
    for _ in range(8):
        crowd.ask("a0")
    crowd.run(3)
    crowd.ask("a1")
    crowd.run(60)
    assert crowd.served["a1"] > 0


def test_the_ledger_starts_empty_without_slots():
    slots = AdapterSlots(0, 0, 1)
    assert not slots.is_enabled
    assert slots.is_balanced
    assert slots.infos() == []
