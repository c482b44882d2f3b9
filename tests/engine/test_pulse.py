"""Signs of life: what is a hang and what is only slow."""

from __future__ import annotations

import asyncio
import time

import pytest
from engine.driving import request, running
from fakes import FakeExecutor

from llmd.config import HealthConfig
from llmd.engine.pulse import Pulse
from llmd.engine.step import FinishReason
from llmd.errors import EngineFailure, ExecutorHangs, NotReady


class Moving(FakeExecutor):
    """Tells of its work."""

    moves = 0


async def no_answer() -> float:
    await asyncio.sleep(60)
    return 0.0


def test_steps_that_end_are_life():
    pulse = Pulse(FakeExecutor(), 2.0)
    for second in range(20):
        pulse.submitted(second)
        pulse.ended(second + 0.5)
        pulse.tick(1.0)
    assert (pulse.num_steps, pulse.num_in_flight, pulse.stalled_s) == (20, 0, 0.0)
    assert pulse.why_not_alive() is None


def test_a_step_that_does_not_end_is_a_hang():
    pulse = Pulse(FakeExecutor(), 2.0)
    pulse.submitted(0.0)
    pulse.tick(1.0)
    pulse.tick(1.0)
    with pytest.raises(ExecutorHangs, match=r"no step ended and nothing moved for 3\.0 s"):
        pulse.tick(1.0)
    assert pulse.why_not_alive() is not None


def test_a_long_step_that_moves_is_none():
    executor = Moving()
    pulse = Pulse(executor, 2.0)
    pulse.submitted(0.0)
    for _ in range(30):
        executor.moves += 1
        pulse.tick(1.9)
    assert pulse.why_not_alive() is None
    pulse.tick(1.9)
    with pytest.raises(ExecutorHangs):
        pulse.tick(1.9)


def test_where_steps_take_seconds_one_more_proves_nothing_and_is_forgotten():
    pulse = Pulse(FakeExecutor(), 2.0)
    pulse.submitted(0.0)
    pulse.ended(4.0)
    assert pulse.patience_s == 12.0
    for step in range(200):
        pulse.submitted(10.0 + step)
        pulse.ended(10.1 + step)
    assert pulse.patience_s == 2.0


def test_the_second_step_in_flight_is_timed_from_the_end_of_the_first():
    pulse = Pulse(FakeExecutor(), 1.0)
    pulse.submitted(0.0)
    pulse.submitted(0.1)
    pulse.ended(1.0)
    pulse.ended(2.0)
    assert pulse.patience_s == 3.0


async def test_an_idle_executor_proves_its_life_by_answers():
    pulse = Pulse(FakeExecutor(), 0.2)
    watching = asyncio.ensure_future(pulse.watch())
    await asyncio.sleep(0.6)
    assert not watching.done()
    assert pulse.num_signs >= 3
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


async def test_an_idle_executor_that_does_not_answer_hangs():
    executor = FakeExecutor()
    executor.ping = no_answer
    with pytest.raises(ExecutorHangs, match="the idle executor gave no answer"):
        await asyncio.wait_for(Pulse(executor, 0.2).watch(), 5)


async def test_an_idle_executor_that_is_gone_is_told_as_it_is():
    async def gone() -> float:
        raise EngineFailure("the thread ended")

    executor = FakeExecutor()
    executor.ping = gone
    with pytest.raises(EngineFailure, match="the thread ended"):
        await asyncio.wait_for(Pulse(executor, 5.0).watch(), 5)


class Prompting(FakeExecutor):
    """A step of a second, whose layers can be seen to pass."""

    is_moving = True

    @property
    def moves(self) -> float:
        return time.monotonic() if self.is_moving else 0.0


@pytest.mark.parametrize("is_moving", [True, False])
async def test_an_engine_tells_a_long_prompt_from_a_hang(is_moving):
    executor = Prompting(step_s=1.0)
    executor.is_moving = is_moving
    async with running(executor, HealthConfig(hang_timeout_s=0.3)) as (engine, sink, _):
        engine.add(request("long", sampling={"max_tokens": 1}))
        reasons = await sink.end("long")
        if is_moving:
            assert reasons == [FinishReason.LENGTH]
            assert engine.failure is None
        else:
            assert reasons == [FinishReason.ERROR]
            assert isinstance(engine.failure, ExecutorHangs)
            executor.stopped = True  # nobody waits for it


async def test_an_engine_whose_idle_executor_is_gone_fails_without_a_request():
    failures = []

    async def gone() -> float:
        raise EngineFailure("the thread ended")

    async with running() as (engine, _, executor):
        engine._on_failure = failures.append
        executor.ping = gone
        async with asyncio.timeout(5):
            while not failures:
                await asyncio.sleep(0.05)
        assert str(engine.failure) == "the thread ended"
        with pytest.raises(NotReady):
            engine.add(request("late"))
