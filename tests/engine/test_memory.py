"""Steps that find no memory: nothing is lost, steps get smaller, and it always ends."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import replace

import pytest
from engine.driving import request, running
from fakes import FakeExecutor, FakeGrammar, expected_tokens, fake_info, greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd.engine.executor import KVGroup
from llmd.engine.memory import TokenBudget
from llmd.engine.params import PoolingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason
from llmd.errors import StepFailed, StepOutOfMemory

PAGED, HYBRID = (KVGroup(),), (KVGroup(), KVGroup(name="state", kind="state"))


class Tight(FakeExecutor):
    """Finds no memory in the steps that `is_tight` names."""

    def __init__(self, is_tight, groups=PAGED, **options) -> None:
        super().__init__(fake_info(max_model_len=256, kv_groups=groups), **options)
        self.is_tight, self.num_plans = is_tight, 0

    def submit(self, plan, masks=None):
        if self.is_tight(self.num_plans, plan):
            self.fail_next = StepOutOfMemory("no memory")
        self.num_plans += 1
        return super().submit(plan, masks)


@pytest.mark.parametrize("groups", [PAGED, HYBRID])
@pytest.mark.parametrize("failing", [{0}, {1}, {2, 3}, {0, 4, 9}, {3, 8, 30}])
async def test_every_token_is_as_if_nothing_had_happened(failing, groups):
    async with running(Tight(lambda nth, plan: nth in failing, groups)) as (engine, sink, executor):
        for index in range(6):
            engine.add(request(f"r{index}", length=3 + 9 * index, sampling={"max_tokens": 12}))
        for index in range(6):
            assert await sink.end(f"r{index}") == [FinishReason.LENGTH]
            assert sink.tokens(f"r{index}") == expected_tokens(list(range(1, 4 + 9 * index)), 12, 1000)
        engine._scheduler.check()
        assert engine.stats().num_out_of_memory >= len([nth for nth in failing if nth < executor.num_plans]) / 2
        assert engine.stats().num_preemptions


@pytest.mark.parametrize("groups", [PAGED, HYBRID])
async def test_siblings_vectors_logprobs_and_grammars_come_out_whole(groups):
    vocab = 1000
    executor = Tight(lambda nth, plan: nth in (1, 5, 9), groups)
    async with running(executor, max_num_batched_tokens=32) as (engine, sink, _):
        grammar = FakeGrammar(vocab)
        engine.add(request("n", length=20, sampling={"max_tokens": 8, "n": 3}))
        engine.add(request("v", length=70, params=PoolingParams()))
        engine.add(request("l", length=70, params=greedy(max_tokens=2, logprobs=1, prompt_logprobs=1)))
        engine.add(Request(request_id="g", prompt=Prompt((5, 6)), params=greedy(max_tokens=40), grammar=grammar))
        assert await sink.end("n", 3) == [FinishReason.LENGTH] * 3
        assert sink.tokens("n", 2) == expected_tokens(list(range(1, 21)), 8, vocab)
        await sink.end("v")
        assert len(sink.deltas["v"][-1].pooled) == 12
        await sink.end("l")
        told = [entry.token_id for delta in sink.deltas["l"] for entry in delta.prompt_logprobs or ()]
        assert told == list(range(2, 71))
        await sink.end("g")
        assert sink.tokens("g") == expected_tokens([5, 6], 40, vocab, matcher=grammar.matcher())
        engine._scheduler.check()


async def test_a_large_step_is_tried_again_smaller():
    async with running(Tight(lambda nth, plan: plan.num_tokens > 40)) as (engine, sink, _):
        engine.add(request("long", length=200, sampling={"max_tokens": 4}))
        assert await sink.end("long") == [FinishReason.LENGTH]
        assert engine._scheduler.token_budget == 32
        assert engine.stats().num_out_of_memory == 1


async def test_what_never_fits_ends_with_an_error_and_the_rest_goes_on():
    rows = {}

    def is_tight(nth, plan):
        rows.update({entry.row: entry.request_id for entry in plan.admitted})
        return any(rows[row] == "huge" for row in plan.rows)

    async with running(Tight(is_tight)) as (engine, sink, _):
        engine.add(request("huge", length=100))
        engine.add(request("small", length=4))
        assert await sink.end("huge") == [FinishReason.ERROR]
        assert "no memory" in sink.deltas["huge"][-1].error
        assert await sink.end("small") == [FinishReason.LENGTH]
        assert sink.tokens("small") == expected_tokens([1, 2, 3, 4], 6, 1000)


async def test_a_device_that_never_has_memory_ends_every_request():
    async with running(Tight(lambda nth, plan: True)) as (engine, sink, _):
        for index in range(5):
            engine.add(request(f"r{index}"))
        for index in range(5):
            assert await sink.end(f"r{index}") == [FinishReason.ERROR]
        assert engine.failure is None


async def test_a_step_that_fails_behind_one_without_memory_is_computed_again_too():
    class Both(Tight):
        def submit(self, plan, masks=None):
            answer = super().submit(plan, masks)
            if self.num_plans == 3:
                self.fail_next = StepFailed("another")
            return answer

    async with running(Both(lambda nth, plan: nth == 2)) as (engine, sink, _):
        for index in range(3):
            engine.add(request(f"r{index}", length=60))
        for index in range(3):
            assert await sink.end(f"r{index}") == [FinishReason.LENGTH]


async def test_failures_without_end_cannot_keep_a_prompt_for_ever():
    """Every fourth step fails, and what was computed is lost each time: the largest go, the small ones come through."""
    async with running(Tight(lambda nth, plan: nth % 4 == 1), max_num_batched_tokens=32) as (engine, sink, _):
        engine.add(request("n", length=20, sampling={"max_tokens": 8, "n": 3}))
        engine.add(request("l", length=200, params=greedy(max_tokens=2, logprobs=1, prompt_logprobs=1)))
        engine.add(request("s", length=2, sampling={"max_tokens": 2}))
        await sink.end("n", 3)
        assert await sink.end("l") == [FinishReason.ERROR]
        await sink.end("s")
        engine._scheduler.check()


def test_the_budget_comes_back():
    budget = TokenBudget(100)
    assert [budget.failed() for _ in range(4)] == [False, False, False, True]
    assert (budget.tokens, budget.is_full) == (16, False)
    grown = [budget.tokens for _ in range(3 * 2048) if budget.succeeded()]
    assert grown == [32, 64, 100]
    assert budget.is_full
    assert TokenBudget(8).failed() is False


class Lossy(Tight):
    """What a failed step was to put into slots and to write of tokens is lost with it."""

    def __init__(self, is_tight, groups=PAGED, **facts) -> None:
        super().__init__(is_tight, groups)
        self.device.info = fake_info(max_model_len=256, kv_groups=groups, max_loras=2, max_cpu_loras=2, **facts)
        self.device.slots = defaultdict(lambda: "nothing")
        inner = self.device.fail
        self.device.fail = lambda plan: inner(replace(plan, adapter_loads=(), token_updates=()))


def adapted(index, adapter, length, **changes):
    return Request(
        request_id=f"r{index}", prompt=Prompt(tuple(range(1, length + 1))), params=greedy(max_tokens=5),
        adapter=adapter, **changes,
    )  # fmt: skip


async def test_a_slot_that_was_not_filled_is_filled_again():
    async with running(Lossy(lambda nth, plan: nth == 0)) as (engine, sink, executor):
        await engine.adapter_store.load("sql", "/sql")
        engine.add(adapted(0, "sql", 6))
        assert await sink.end("r0") == [FinishReason.LENGTH]
        assert sink.tokens("r0") == expected_tokens(list(range(1, 7)), 5, 1000, adapter="/sql")
        assert executor.device.slots[0] == "/sql"
        (info,) = engine.adapter_store.list()
        assert info.num_slot_loads == 2


async def test_forced_tokens_that_were_not_written_are_computed():
    """Of a grammar that leaves no choice: they ride in a step as an update of its row."""
    seen = []

    def is_tight(nth, plan):
        seen.append(bool(plan.token_updates))
        return seen.count(True) in (1, 3) and seen[-1]

    grammar = FakeGrammar(1000)
    async with running(Lossy(is_tight)) as (engine, sink, _):
        engine.add(Request(request_id="g", prompt=Prompt((5, 6)), params=greedy(max_tokens=60), grammar=grammar))
        assert await sink.end("g")
        assert any(seen)
        assert sink.tokens("g") == expected_tokens([5, 6], 60, 1000, matcher=grammar.matcher())
        assert engine.stats().num_out_of_memory >= 1


@settings(max_examples=60, deadline=None)
@given(
    failing=st.sets(st.integers(0, 40), max_size=14),
    asked=st.lists(st.tuples(st.integers(1, 90), st.sampled_from([None, "sql", "law", "med"])), min_size=1, max_size=7),
    groups=st.sampled_from([PAGED, HYBRID]),
)
def test_wherever_memory_lacks_every_request_ends_as_it_should(failing, asked, groups):
    """With its own tokens, or for want of memory; and nothing is left behind."""

    async def run():
        async with running(Lossy(lambda nth, plan: nth in failing, groups)) as (engine, sink, _):
            for name in ("sql", "law", "med"):
                await engine.adapter_store.load(name, f"/{name}")
            for index, (length, adapter) in enumerate(asked):
                engine.add(adapted(index, adapter, length))
            for index, (length, adapter) in enumerate(asked):
                (reason,) = await sink.end(f"r{index}")
                path = f"/{adapter}" if adapter else None
                expected = expected_tokens(list(range(1, length + 1)), 5, 1000, adapter=path)
                found = sink.tokens(f"r{index}")
                if reason is FinishReason.ERROR:
                    assert "no memory" in sink.deltas[f"r{index}"][-1].error
                    assert len(failing) >= 4
                    assert found == expected[: len(found)]
                else:
                    assert found == expected
            engine._scheduler.check()
            assert engine.is_idle
            assert engine.failure is None
            assert engine.stats().num_out_of_memory <= len(failing)

    asyncio.run(run())
