"""A flight record runs again: the same plans, the same tokens; what differs and what fails is told."""

from __future__ import annotations

import asyncio
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from daemons import Daemon
from engine.driving import request, running
from fakes import FakeExecutor, fake_info, greedy

from llmd.config import HealthConfig
from llmd.engine.params import PoolingParams
from llmd.errors import StepFailed, StepOutOfMemory
from llmd.replay import BadRecord, _check_size, _replay, check_plans, read_flight
from llmd.replay.plans import needs
from llmd_plugins.commands.replay.command import replay

CONFIG = SimpleNamespace(models=[SimpleNamespace(model="")])


class Breaking(FakeExecutor):
    """Some steps find no memory, another fails."""

    num_plans = 0

    def submit(self, plan, masks=None):
        self.num_plans += 1
        if self.num_plans in (5, 9):
            self.fail_next = StepOutOfMemory("no memory")
        if self.num_plans == 20:
            self.fail_next = StepFailed("broken")
        return super().submit(plan, masks)


async def recorded(tmp_path, *, executor=None, **health) -> dict:
    """What an engine did: prompts in pieces, prefix hits, preemption, siblings, a vector."""
    settings = {"state_dir": str(tmp_path), "flight_tokens": True, **health}
    async with running(executor or FakeExecutor(fake_info(num_blocks=40)), HealthConfig(**settings)) as (engine, sink, _):
        engine.add(request("first", length=30, sampling={"max_tokens": 20}))
        await sink.end("first")
        for index in range(6):
            engine.add(request(f"r{index}", length=30 + index, sampling={"max_tokens": 12 + index, "n": 1 + index % 2}))
        engine.add(request("v", length=50, params=PoolingParams()))
        engine.add(request("l", length=40, params=greedy(max_tokens=3, prompt_logprobs=1)))
        for index in range(6):
            await sink.end(f"r{index}", 1 + index % 2)
        path = await engine.dump("SIGQUIT")
    return read_flight(path)


def again(content: dict, executor=None):
    return asyncio.run(_replay(content, executor or FakeExecutor(fake_info()), needs(content), CONFIG))


@pytest.mark.parametrize("flight_steps", [512, 25, 7, 1])
def test_the_same_plans_give_the_same_tokens(tmp_path, flight_steps):
    """Also where the ring began in the midst of everything: what was computed before is computed again."""
    content = asyncio.run(recorded(tmp_path, flight_steps=flight_steps))
    found = again(content)
    assert found.is_same, found
    assert found.num_steps == len(content["steps"]) <= max(flight_steps, 4)
    assert found.compared > 0


def test_steps_that_failed_are_followed_through(tmp_path):
    content = asyncio.run(recorded(tmp_path, executor=Breaking(fake_info(num_blocks=40))))
    assert check_plans(content) == []
    assert [step["error"] for step in content["steps"] if step["error"]]


def test_another_model_diverges_and_is_told_where(tmp_path):
    content = asyncio.run(recorded(tmp_path))
    steps = [step for step in content["steps"] if step["token_ids"]]
    steps[3]["token_ids"][0] += 1
    found = again(content)
    (divergence,) = found.divergences
    assert (divergence.step_id, divergence.recorded) == (steps[3]["step_id"], divergence.now + 1)
    assert not found.is_same


def test_without_tokens_the_shapes_run(tmp_path):
    content = asyncio.run(recorded(tmp_path, flight_tokens=False, flight_steps=20))
    assert "token_ids" not in content["steps"][0]
    found = again(content)
    assert (found.is_same, found.compared, found.num_steps) == (True, 0, 20)


def test_a_step_that_fails_again_is_named(tmp_path):
    content = asyncio.run(recorded(tmp_path))
    executor = FakeExecutor(fake_info())
    executor.fail_next = StepFailed("broken here too")
    found = again(content, executor)
    assert found.failures[0] == "step 0: StepFailed: broken here too"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda step: step.update(starts=[start + 9 for start in step["starts"]]), "tokens were before"),
        (lambda step: step.update(block_updates=[]), "blocks do not hold"),
        (lambda step: step["rows"].__setitem__(0, 7), "has no sequence"),
        (lambda step: step["block_updates"][0].__setitem__(2, 5), "blocks and is given more from 5 on"),
        (lambda step: step["block_updates"][0].__setitem__(3, [99] * 8), "is given block 99 of"),
    ],
)
def test_plans_that_cannot_be_are_found(tmp_path, change, problem):
    content = asyncio.run(recorded(tmp_path))
    assert check_plans(content) == []
    step = next(step for step in content["steps"][5:] if step["block_updates"] and 7 not in step["rows"])
    change(step)
    assert any(problem in line for line in check_plans(content)), check_plans(content)


@pytest.mark.parametrize(
    ("copies", "problem"),
    [
        ([[39, 0]], "block 39 is copied and free"),
        ([["source", "source"]], "is copied and is written by a copy"),
        ([["source", "source"]], "which is not one new row's alone"),
        ([["source", "target"], ["source", "target"]], "which is not one new row's alone"),
    ],
)
def test_copies_that_cannot_be_are_found(tmp_path, copies, problem):
    content = asyncio.run(recorded(tmp_path))
    step = next(step for step in content["steps"] if step["block_copies"])
    assert all(len(copy) == 2 for copy in step["block_copies"])
    names = dict(zip(("source", "target"), step["block_copies"][0], strict=True))
    step["block_copies"] = [[names.get(block, block) for block in copy] for copy in copies]
    assert any(problem in line for line in check_plans(content)), check_plans(content)


def test_copies_run_again_and_a_record_from_before_them_too(tmp_path):
    content = asyncio.run(recorded(tmp_path))
    executor = FakeExecutor(fake_info())
    assert again(content, executor).is_same
    assert executor.device.num_copies == sum(len(step["block_copies"]) for step in content["steps"]) > 0
    for step in content["steps"]:
        del step["block_copies"]
    assert again(content).is_same


def test_what_is_too_small_is_told(tmp_path):
    content = asyncio.run(recorded(tmp_path))
    with pytest.raises(BadRecord, match="the model's context is 16"):
        _check_size(needs(content), fake_info(max_model_len=16))
    with pytest.raises(BadRecord, match="the pool has 4"):
        _check_size(needs(content), fake_info(num_blocks=4))


@pytest.mark.parametrize(("text", "reason"), [("{", "is no JSON"), ("{}", "is no flight record"), ("[1]", "is no flight")])
def test_other_files_are_refused(tmp_path, text, reason):
    file = tmp_path / "flight.json"
    file.write_text(text)
    with pytest.raises(BadRecord, match=reason):
        read_flight(file)


def test_the_command_runs_a_record_on_the_demo_model(tmp_path):
    content = asyncio.run(recorded(tmp_path, flight_tokens=False))
    file = tmp_path / "flight.json"
    file.write_text(json.dumps(content))
    result = CliRunner().invoke(replay, [str(file), "--model", "demo", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["num_steps"] == len(content["steps"])


def test_a_daemons_record_says_the_same_again(tmp_path):
    settings = {
        "LLMD_HEALTH__STATE_DIR": str(tmp_path), "LLMD_HEALTH__FLIGHT_TOKENS": "true", "LLMD_CACHE__KV_CACHE_BYTES": "16M",
    }  # fmt: skip
    with Daemon("serve", "demo", cwd=tmp_path, fake=False, **settings) as daemon:
        daemon.ready()
        with ThreadPoolExecutor(3) as pool:
            asked = {"max_tokens": 12, "ignore_eos": True, "seed": 5}
            list(pool.map(lambda prompt: daemon.complete(prompt, **asked), ("Once upon", "The cat", "Tell me")))
        daemon.signal(signal.SIGQUIT)
        daemon.wait_for("SIGQUIT: the last .* steps are in")
        assert daemon.stop() == 0
    (file,) = tmp_path.glob("flight-*.json")
    assert file.stat().st_mode & 0o077 == 0
    result = CliRunner().invoke(replay, [str(file)])
    assert result.exit_code == 0, result.output
    assert "plans: no contradictions" in result.output
    assert "compared, no rows diverge" in result.output
