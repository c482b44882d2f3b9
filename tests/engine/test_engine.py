"""The step loop over a fake executor: streams end, errors stay where they belong, drains and failures are truthful."""

from __future__ import annotations

import asyncio
import time

import pytest
from engine.driving import Sink, request, running
from fakes import FakeExecutor, FakeGrammar, FakeMatcher, expected_tokens, fake_info, greedy

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.engine import Engine
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason
from llmd.errors import ConfigError, EngineFailure, InvalidRequest, NotReady, Overloaded, StepFailed
from llmd_plugins.scheduling.fcfs import FcfsQueue


async def test_requests_run_together_and_give_what_the_model_says():
    async with running() as (engine, sink, executor):
        for index in range(12):
            engine.add(request(f"r{index}", length=3 + index))
        for index in range(12):
            assert await sink.end(f"r{index}") == [FinishReason.LENGTH]
            assert sink.tokens(f"r{index}") == expected_tokens(list(range(1, 4 + index)), 6, 1000)
        assert executor.max_outstanding == 2
        stats = engine.stats()
        assert (stats.admitted, stats.finished, stats.num_running, stats.num_waiting) == (12, 12, 0, 0)
        assert stats.num_output_tokens == 72
        assert stats.kv_usage == 0


async def test_steps_are_counted_by_their_size_and_for_each_sequence():
    async with running() as (engine, sink, _):
        (alone,) = engine.add(request("a", length=10, sampling={"max_tokens": 6}))
        assert await sink.end("a") == [FinishReason.LENGTH]
        stats = engine.stats()
        assert alone.num_steps == 6  # the prompt's and five more
        assert alone.is_finished
        assert stats.step_sizes[0] == 5
        assert stats.step_sizes[4] == 1  # 10 tokens: more than 8 and at most 16
        assert stats.num_step_tokens == 15
        assert stats.num_context_tokens == 10 + 11 + 12 + 13 + 14 + 15
        assert engine.adapters() == (frozenset(), frozenset())


async def test_a_conversation_finds_its_prefix_again():
    async with running() as (engine, sink, _):
        engine.add(request("a", length=10, sampling={"max_tokens": 11}))
        await sink.end("a")
        followed = (*range(1, 11), *sink.tokens("a"), 7)
        engine.add(Request(request_id="b", prompt=Prompt(followed), params=greedy(max_tokens=1)))
        await sink.end("b")
        assert sink.deltas["b"][0].num_cached_tokens == 20  # 10 + 11 tokens, the last not computed: 5 blocks of 4
        assert sink.deltas["b"][0].queue_s >= 0
        stats = engine.stats()
        assert stats.prefix_hits == 20


async def test_stop_tokens_eos_and_min_tokens():
    expected = expected_tokens([1, 2, 3, 4, 5], 8, 1000)
    async with running() as (engine, sink, _):
        engine.add(request("eos", eos_token_ids=(expected[2],), sampling={"max_tokens": 8}))
        engine.add(request("ignored", eos_token_ids=(expected[2],), sampling={"max_tokens": 8, "ignore_eos": True}))
        engine.add(request("stop", sampling={"max_tokens": 8, "stop_token_ids": (expected[3],)}))
        engine.add(request("late", sampling={"max_tokens": 8, "stop_token_ids": (expected[3],), "min_tokens": 5}))
        assert await sink.end("eos") == [FinishReason.STOP]
        assert await sink.end("stop") == [FinishReason.STOP]
        assert await sink.end("ignored") == await sink.end("late") == [FinishReason.LENGTH]
        assert sink.tokens("eos") == expected[:3]
        assert sink.deltas["eos"][-1].stop_token_id is None
        assert sink.tokens("stop") == expected[:4]
        assert sink.deltas["stop"][-1].stop_token_id == expected[3]


async def test_vectors_logprobs_and_prompt_logprobs_arrive():
    async with running() as (engine, sink, _):
        engine.add(request("v", length=70, params=PoolingParams()))
        engine.add(request("l", length=70, params=greedy(max_tokens=2, logprobs=1, prompt_logprobs=1)))
        assert await sink.end("v") == [FinishReason.STOP]
        assert len(sink.deltas["v"][-1].pooled) == 12
        await sink.end("l")
        told = [entry.token_id for delta in sink.deltas["l"] for entry in delta.prompt_logprobs or ()]
        assert told == list(range(2, 71))
        assert [len(delta.logprobs) for delta in sink.deltas["l"] if delta.token_ids] == [1, 1]


async def test_an_encoder_has_no_blocks_and_computes_whole_prompts():
    info = fake_info(num_blocks=0, kv_groups=(), needs_whole_prompts=True, can_generate=False)
    async with running(FakeExecutor(info), max_num_batched_tokens=50) as (engine, sink, executor):
        for index, length in enumerate((30, 25, 100, 20)):  # the third is longer than a step's budget
            engine.add(request(f"v{index}", length=length, params=PoolingParams(pooling="mean")))
        for index in range(4):
            assert await sink.end(f"v{index}") == [FinishReason.STOP]
        assert executor.device.num_computed == 175
        with pytest.raises(InvalidRequest, match="generates no text"):
            engine.add(request("t"))


async def test_abort_and_finish_are_silent_and_free_everything():
    async with running(FakeExecutor(step_s=0.002)) as (engine, sink, _):
        engine.add(request("a", sampling={"max_tokens": 100}))
        engine.add(request("n", sampling={"max_tokens": 100, "n": 2}))
        async with asyncio.timeout(5):
            while len(sink.tokens("n", 1)) < 3:
                await asyncio.sleep(0.001)
        engine.abort("a")
        engine.abort("a")
        engine.abort("unknown")
        engine.finish("n", 0, FinishReason.STOP)
        count = len(sink.tokens("n", 0))
        engine.finish("n", 1, FinishReason.STOP)
        await asyncio.sleep(0.02)
        assert len(sink.tokens("n", 0)) <= count + 1
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
        assert engine.failure is None


async def test_a_deadline_ends_a_request_with_timeout():
    async with running(FakeExecutor(step_s=0.01)) as (engine, sink, _):
        engine.add(request("late", sampling={"max_tokens": 100}, deadline_s=time.monotonic() + 0.05))
        engine.add(request("well", sampling={"max_tokens": 20}))
        assert await sink.end("late") == [FinishReason.TIMEOUT]
        assert await sink.end("well") == [FinishReason.LENGTH]


async def test_bad_requests_are_refused_before_anything_is_queued():
    async with running() as (engine, _, _executor):
        cases = [
            (Request(request_id="e", prompt=Prompt(()), params=greedy()), "empty"),
            (request("long", length=128), "128 tokens"),
            (Request(request_id="v", prompt=Prompt((1, 1000)), params=greedy()), "between 0 and 999"),
            (Request(request_id="m", prompt=Prompt((1, -1)), params=greedy()), "between 0 and 999"),
        ]
        for bad, message in cases:
            with pytest.raises(InvalidRequest, match=message):
                engine.add(bad)
        engine.add(request("same"))
        with pytest.raises(InvalidRequest, match="already running"):
            engine.add(request("same"))
        assert engine.stats().admitted == 1


async def test_whole_prompts_only_where_chunks_are_off():
    async with running(enable_chunked_prefill=False) as (engine, _, _executor):
        with pytest.raises(InvalidRequest, match="a step takes 64"):
            engine.add(request("long", length=65))


async def test_a_full_queue_says_when_to_come_back():
    async with running(FakeExecutor(step_s=0.01), max_waiting_requests=3, max_waiting_tokens=100) as (engine, _, _executor):
        for index in range(3):
            engine.add(request(f"r{index}"))
        with pytest.raises(Overloaded, match="limit 3") as refused:
            engine.add(request("one more"))
        assert 1 <= refused.value.retry_after_s <= 60
        with pytest.raises(Overloaded, match="limit 100"):
            engine.check_admission(num_tokens=95, num_requests=0)


async def test_a_failed_step_ends_its_sequences_and_the_engine_goes_on(caplog):
    async with running() as (engine, sink, executor):
        executor.fail_next = StepFailed("one bad step")
        engine.add(request("hit"))
        assert await sink.end("hit") == [FinishReason.ERROR]
        assert "the step failed" in sink.deltas["hit"][-1].error
        engine.add(request("next"))
        assert await sink.end("next") == [FinishReason.LENGTH]
        assert sink.tokens("next") == expected_tokens([1, 2, 3, 4, 5], 6, 1000)


async def test_a_lost_device_ends_everything_and_says_so():
    failures = []
    executor = FakeExecutor()
    sink = Sink()
    engine = Engine(
        executor, SchedulerConfig(max_num_seqs=8), CacheConfig(), waiting=FcfsQueue(), publish=sink.publish,
        on_failure=failures.append,
    )  # fmt: skip
    await engine.start(lambda progress: None)
    engine.add(request("a", sampling={"max_tokens": 50}))
    executor.fail_next = EngineFailure("device lost")
    engine.add(request("b", sampling={"max_tokens": 50}))
    assert await sink.end("a") == await sink.end("b") == [FinishReason.ERROR]
    assert str(failures[0]) == str(engine.failure) == "device lost"
    with pytest.raises(NotReady):
        engine.add(request("c"))
    await engine.stop()


async def test_drain_lets_running_requests_finish_and_aborts_the_rest():
    async with running(FakeExecutor(step_s=0.01)) as (engine, sink, _):
        engine.add(request("short", sampling={"max_tokens": 3}))
        engine.add(request("endless", sampling={"max_tokens": 120}))
        await asyncio.sleep(0.01)
        stopping = asyncio.create_task(engine.stop(drain_s=0.3))
        await asyncio.sleep(0.01)
        with pytest.raises(NotReady):
            engine.add(request("late"))
        await stopping
        assert await sink.end("short") == [FinishReason.LENGTH]
        assert await sink.end("endless") == [FinishReason.ABORT]


async def test_a_pool_too_small_for_one_sequence_stops_the_start():
    engine = Engine(
        FakeExecutor(fake_info(num_blocks=10)),
        SchedulerConfig(),
        CacheConfig(),
        waiting=FcfsQueue(),
        publish=lambda deltas: None,
    )
    with pytest.raises(ConfigError, match="holds 40 tokens"):
        await engine.start(lambda progress: None)


async def test_seeds_make_requests_repeatable_and_their_sequences_different():
    async with running() as (engine, sink, _):
        params = SamplingParams(seed=5, n=2, max_tokens=4)
        engine.add(request("a", params=params))
        engine.add(request("b", params=params))
        await sink.end("a", 2)
        await sink.end("b", 2)
        assert sink.tokens("a", 0) == sink.tokens("b", 0)
        assert sink.tokens("a", 1) == sink.tokens("b", 1) == expected_tokens([1, 2, 3, 4, 5], 4, 1000, seed=6)
        assert sink.tokens("a", 0) != sink.tokens("a", 1)


async def test_grammars_constrain_their_own_rows_and_force_without_a_step_each():
    async with running(FakeExecutor(step_s=0.001)) as (engine, sink, executor):
        grammar = FakeGrammar(1000, salt=1)
        engine.add(request("free", sampling={"max_tokens": 30}))
        engine.add(request("bound", sampling={"max_tokens": 30}, grammar=grammar))
        engine.add(request("scored", sampling={"max_tokens": 30, "logprobs": 0}, grammar=grammar))
        for name in ("free", "bound", "scored"):
            await sink.end(name)
        prompt = [1, 2, 3, 4, 5]
        assert sink.tokens("free") == expected_tokens(prompt, 30, 1000)
        assert sink.tokens("bound") == sink.tokens("scored") == expected_tokens(prompt, 30, 1000, 0, grammar.matcher())
        assert len(sink.deltas["bound"]) < len(sink.deltas["scored"]) == len(sink.tokens("scored"))
        assert executor.max_outstanding == 2


class BrokenGrammar(FakeGrammar):
    """Its masks raise."""

    def matcher(self):
        matcher = FakeMatcher(self)
        matcher.fill = None
        return matcher


async def test_a_grammar_that_raises_ends_its_own_request_only():
    async with running() as (engine, sink, _):
        engine.add(request("broken", sampling={"max_tokens": 30}, grammar=BrokenGrammar(1000, salt=2)))
        engine.add(request("free", sampling={"max_tokens": 30}))
        assert await sink.end("broken") == [FinishReason.ERROR]
        assert sink.deltas["broken"][-1].error == "the grammar failed: TypeError"
        assert await sink.end("free") == [FinishReason.LENGTH]
        assert sink.tokens("free") == expected_tokens([1, 2, 3, 4, 5], 30, 1000)
