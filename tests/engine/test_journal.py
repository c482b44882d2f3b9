"""Prompts that were running in a crash: found again, run alone, acquitted or refused; never a loop."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace

import pytest
from engine.driving import request, running
from fakes import FakeExecutor

from llmd.config import HealthConfig
from llmd.engine.isolation import IsolatingFairQueue, isolate
from llmd.engine.journal import Journal, Left, Suspects, prompt_digest
from llmd.engine.queue import FairQueue
from llmd.engine.step import FinishReason, RowAdmit, StepPlan
from llmd.errors import InvalidRequest
from llmd.state import StateFolder
from llmd_plugins.scheduling.fair import FairQueue as BuiltinFairQueue
from llmd_plugins.scheduling.fcfs import FcfsQueue


def digest(length: int) -> str:
    return prompt_digest(range(1, length + 1), None).hex()


def admit(row: int, length: int) -> RowAdmit:
    tokens = tuple(range(1, length + 1))
    params = request("x").params
    return RowAdmit(
        row=row, seq_id=row, request_id=f"r{row}", token_ids=(*tokens, 99), num_prompt_tokens=length, params=params, seed=0
    )


def crash(folder, *lengths: int) -> None:
    """What a process leaves behind that dies while prompts of these lengths run."""
    opened = Journal.open(StateFolder(folder), "")
    assert opened is not None
    opened[0].note(StepPlan(step_id=0, admitted=[admit(row, length) for row, length in enumerate(lengths)]))
    opened[0]._shut()


def test_the_journal_tells_the_next_process_who_was_running(tmp_path):
    folder = StateFolder(tmp_path)
    journal, left = Journal.open(folder, "a/model")
    assert left == []
    journal.note(StepPlan(step_id=0, admitted=[admit(0, 5), admit(3, 9)]))
    journal.note(StepPlan(step_id=1, released=[0], admitted=[admit(1, 7)]))
    assert Journal.open(folder, "a/model") is None  # it belongs to one process
    journal._shut()
    journal, left = Journal.open(folder, "a/model")
    assert left == [Left(digest(7), "r1"), Left(digest(9), "r3")]
    journal.note(StepPlan(step_id=0, admitted=[admit(0, 5)]))
    journal.close()
    assert Journal.open(folder, "a/model")[1] == []


def test_a_journal_that_cannot_be_written_ends_with_one_line(tmp_path, caplog):
    journal, _ = Journal.open(StateFolder(tmp_path), "")
    os.close(journal._descriptor)
    journal._descriptor = os.open("/dev/full", os.O_WRONLY)
    journal.note(StepPlan(step_id=0, admitted=[admit(0, 5), admit(1, 6)]))
    assert caplog.text.count("the journal of running requests ends") == 1
    journal.close()


def test_digests_tell_prompts_and_adapters_apart():
    names = {prompt_digest(ids, adapter) for ids in ((1, 2), (1, 3), (2, 1), (258,)) for adapter in (None, "a")}
    assert len(names) == 8


def test_suspects_are_refused_after_two_crashes_and_for_a_while_only(tmp_path):
    folder, now_s = StateFolder(tmp_path), time.time()
    for count in (1, 2):
        suspects = Suspects(folder, "m", 60.0)
        suspects.accuse([Left(digest(5), "r")], now_s)
        if count == 1:
            assert suspects.crashes(request("again")) == 1
        else:
            with pytest.raises(InvalidRequest, match="2 times in a row: it is refused for"):
                suspects.crashes(request("again"))
    assert suspects.crashes(request("other", length=6)) == 0
    assert not Suspects(folder, "m", 60.0, now_s + 61)
    suspects.acquit(request("again"))
    assert not Suspects(folder, "m", 60.0)


def test_the_daemons_own_requests_are_never_suspected(tmp_path):
    own = replace(admit(0, 5), request_id="warm-up-demo")
    journal, _ = Journal.open(StateFolder(tmp_path), "")
    journal.note(StepPlan(step_id=0, admitted=[own]))
    journal._shut()
    assert Journal.open(StateFolder(tmp_path), "")[1] == []
    suspects = Suspects(StateFolder(tmp_path), "m", 60.0)
    for _ in range(3):
        suspects.accuse([Left(digest(5), "r")])
    assert suspects.crashes(request("warm-up-demo")) == 0


def test_a_file_of_garbage_suspects_nobody(tmp_path):
    (tmp_path / "suspects-m.json").write_text('{"a": 1, "b": {"crashes": "x", "last_s": 3}, "c": []}')
    assert not Suspects(StateFolder(tmp_path), "m", 60.0)


async def test_a_suspect_runs_alone_and_is_acquitted(tmp_path):
    crash(tmp_path, 5, 6)
    executor, seen, at = FakeExecutor(), set(), {}
    submit = executor.submit

    def watched(plan, masks=None):
        at.update({entry.row: entry.request_id for entry in plan.admitted})
        seen.add(frozenset(at[row] for row in plan.rows))
        return submit(plan, masks)

    executor.submit = watched
    async with running(executor, HealthConfig(state_dir=str(tmp_path))) as (engine, sink, _):
        names = ["good1", "bad5", "good2", "bad6", "good3"]
        for name in names:
            engine.add(request(name, length=int(name[-1]) if "bad" in name else 8))
        for name in names:
            assert await sink.end(name) == [FinishReason.LENGTH]
        assert not any(group & {"bad5", "bad6"} and len(group) > 1 for group in seen), seen
        engine.add(request("after", length=5))
        await sink.end("after")
    assert not Suspects(StateFolder(tmp_path), "", 3600.0)
    assert Journal.open(StateFolder(tmp_path), "")[1] == []


async def test_a_suspect_that_goes_on_for_long_is_joined(tmp_path):
    crash(tmp_path, 5)
    async with running(health=HealthConfig(state_dir=str(tmp_path))) as (engine, sink, _):
        engine.add(request("bad", length=5, sampling={"max_tokens": 120}))
        engine.add(request("good", length=8, sampling={"max_tokens": 4}))
        await sink.end("good")
        assert 16 <= len(sink.tokens("bad")) < 120
        await sink.end("bad")


async def test_a_suspect_joins_the_others_where_the_device_is_never_idle(tmp_path, monkeypatch):
    monkeypatch.setattr("llmd.engine.isolation._PATIENCE_S", 0.6)
    crash(tmp_path, 5, 6)
    async with running(FakeExecutor(step_s=0.02), HealthConfig(state_dir=str(tmp_path))) as (engine, sink, _):
        engine.add(request("busy", length=8, sampling={"max_tokens": 110}))
        while not sink.tokens("busy"):
            await asyncio.sleep(0.01)
        before_s = time.monotonic()
        for length in (5, 6):
            engine.add(request(f"bad{length}", length=length, sampling={"max_tokens": 10}))
        engine.add(request("good", length=9, sampling={"max_tokens": 2}))
        await sink.end("good")
        assert time.monotonic() - before_s < 0.6  # it waits for nobody
        assert await sink.end("bad5") == [FinishReason.LENGTH]
        assert time.monotonic() - before_s > 0.6
        assert not sink.deltas.get("bad6")  # one suspect at a time
        assert await sink.end("bad6") == [FinishReason.LENGTH]
        assert not any(delta.finish_reason for delta in sink.deltas["busy"])


async def test_suspects_and_others_take_turns(tmp_path):
    crash(tmp_path, 5, 6)
    async with running(FakeExecutor(), HealthConfig(state_dir=str(tmp_path))) as (engine, sink, _):
        for name, length in (("bad5", 5), ("bad6", 6), ("good", 9)):
            engine.add(request(name, length=length, sampling={"max_tokens": 4}))
        for name in ("bad5", "bad6", "good"):
            await sink.end(name)
        assert list(sink.deltas) == ["bad5", "good", "bad6"]


async def test_without_a_state_directory_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with running() as (engine, sink, _):
        engine.add(request("a"))
        await sink.end("a")
        assert await engine.dump("SIGQUIT") is None
    assert list(tmp_path.iterdir()) == []


async def test_a_failed_engine_leaves_its_journal_to_the_next(tmp_path):
    health = HealthConfig(state_dir=str(tmp_path))
    executor = FakeExecutor()
    async with running(executor, health) as (engine, sink, _):
        executor.submit = lambda plan, masks=None: asyncio.get_running_loop().create_future()
        engine.pulse._hang_timeout_s = 0.2
        engine.add(request("bad", length=5))
        assert await sink.end("bad") == [FinishReason.ERROR]
        assert "no step ended" in str(engine.failure)
        executor.stopped = True  # it would never stop
        engine._blackbox._journal._shut()
    assert Journal.open(StateFolder(tmp_path), "")[1] == [Left(digest(5), "bad")]


def test_a_fair_queue_stays_one(tmp_path):
    inner = BuiltinFairQueue(30.0)
    assert isinstance(inner, FairQueue)
    suspects = Suspects(StateFolder(tmp_path), "m", 60.0)
    wrapped = isolate(inner, suspects, list)
    assert isinstance(wrapped, IsolatingFairQueue)
    assert isinstance(wrapped, FairQueue)
    assert not isinstance(isolate(FcfsQueue(), suspects, list), FairQueue)
