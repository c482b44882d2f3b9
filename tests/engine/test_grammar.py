"""A grammar whose library fails ends its own sequence; the others of the step get their masks."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from fakes import FakeExecutor, FakeGrammar, expected_tokens, fake_info, greedy

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.engine import Engine
from llmd.engine.grammar import GuardedGrammar, MaskJob
from llmd.engine.request import Prompt, Request
from llmd_plugins.scheduling.fcfs import llmd_register_scheduling_policies


class Panic(BaseException):
    """What native code raises when it gives up."""


class Failing:
    """A matcher that panics in one of its methods, after some calls that went well."""

    def __init__(self, where: str, num_well: int = 2) -> None:
        self._where, self._left = where, num_well

    def matcher(self):
        return self

    def _well(self, name: str) -> None:
        if name == self._where:
            self._left -= 1
            if self._left < 0:
                raise Panic("gave up")

    def accept(self, token_ids) -> bool:
        self._well("accept")
        return True

    def fill(self, mask_row) -> None:
        self._well("fill")
        mask_row[:] = -1

    def forced(self) -> list[int]:
        self._well("forced")
        return []

    @property
    def finished(self) -> bool:
        self._well("finished")
        return False


def test_the_other_rows_of_a_mask_job_are_filled():
    job = MaskJob(64)
    job.fill([FakeGrammar(64).matcher(), GuardedGrammar(Failing("fill", 0)).matcher(), None])
    assert list(job.errors) == [1]
    bitmask = job.bitmask.result(0)
    assert (bitmask[1:] == -1).all()
    assert (bitmask[0] != -1).any()


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_process_is_no_failure_of_a_grammar(end):
    failing = Failing("accept")
    failing.accept = lambda token_ids: (_ for _ in ()).throw(end())
    with pytest.raises(end):
        GuardedGrammar(failing).matcher().accept([1])


@pytest.mark.parametrize(("where", "ends"), [("accept", True), ("fill", True), ("forced", False), ("finished", False)])
async def test_a_failure_ends_its_own_sequence_only(where, ends):
    deltas = []
    [spec] = [spec for spec in llmd_register_scheduling_policies() if spec.name == "fcfs"]
    engine = Engine(
        FakeExecutor(fake_info(vocab_size=64)), SchedulerConfig(), CacheConfig(), waiting=spec.build(SchedulerConfig()),
        publish=deltas.extend,
    )  # fmt: skip
    await engine.start(lambda progress: None)
    params = greedy(max_tokens=12)
    good = FakeGrammar(64)
    for request_id, grammar in (("bad", GuardedGrammar(Failing(where))), ("good", GuardedGrammar(good)), ("free", None)):
        engine.add(Request(request_id=request_id, prompt=Prompt((1, 2, 3)), params=params, grammar=grammar))
    await engine.stop(drain_s=10)
    assert engine.failure is None
    tokens = {name: [] for name in ("bad", "good", "free")}
    last = {}
    for delta in deltas:
        tokens[delta.request_id] += delta.token_ids
        last[delta.request_id] = delta
    assert tokens["free"] == expected_tokens([1, 2, 3], 12, 64)
    assert tokens["good"] == expected_tokens([1, 2, 3], 12, 64, matcher=good.matcher())
    assert (last["bad"].finish_reason.value == "error") == ends
    assert np.array_equal(len(tokens["bad"]) < 12, ends)


async def test_a_stop_amid_steps_whose_masks_are_not_begun_comes_to_its_end():
    """The second step in flight gets its masks when the first is committed: after the loop's end nobody would begin them."""
    [spec] = [spec for spec in llmd_register_scheduling_policies() if spec.name == "fcfs"]
    for turns in range(12):
        engine = Engine(
            FakeExecutor(fake_info(vocab_size=64), step_s=0.002), SchedulerConfig(), CacheConfig(),
            waiting=spec.build(SchedulerConfig()), publish=lambda deltas: None,
        )  # fmt: skip
        await engine.start(lambda progress: None)
        engine.add(Request(request_id="a", prompt=Prompt((1, 2, turns)), params=greedy(max_tokens=50), grammar=Allowing()))
        for _ in range(2 + turns):
            await asyncio.sleep(0)
        await asyncio.wait_for(engine.stop(), 5)


class Allowing(Failing):
    """A grammar that allows everything and never ends."""

    def __init__(self) -> None:
        super().__init__("nothing")
