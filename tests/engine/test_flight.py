"""The flight recorder: bounded, silent about texts, and complete enough to tell who was where."""

from __future__ import annotations

import json

from engine.driving import request, running
from fakes import fake_info

from llmd.config import HealthConfig
from llmd.engine.flight import FORMAT, FlightRecorder
from llmd.engine.params import SamplingParams
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan, TokenUpdate
from llmd.state import StateFolder

SECRET = 424242


def admit(row: int, name: str, tokens=(SECRET, 7, 8)) -> RowAdmit:
    params = SamplingParams(max_tokens=9, stop=("secret words",))
    return RowAdmit(
        row=row, seq_id=row, request_id=name, token_ids=tuple(tokens), num_prompt_tokens=len(tokens), params=params, seed=1
    )


def prefill(step_id: int, row: int, name: str) -> StepPlan:
    return StepPlan(
        step_id=step_id, admitted=[admit(row, name)], block_updates=[BlockUpdate(row, 0, 0, (row,))], rows=[row], starts=[0],
        counts=[3], num_logits=[1], samples=[True],
    )  # fmt: skip


def decode(step_id: int, row: int, start: int) -> StepPlan:
    return StepPlan(step_id=step_id, rows=[row], starts=[start], counts=[1], num_logits=[1], samples=[True])


def plain(recorder: FlightRecorder) -> dict:
    return json.loads(json.dumps(recorder.content(fake_info(), reason="test")))


def test_what_leaves_the_ring_is_folded_into_the_rows():
    recorder = FlightRecorder(4)
    for plan in (prefill(0, 3, "early"), *(decode(step, 3, 2 + step) for step in range(1, 6))):
        recorder.record(plan, 0.001, (1, 0, 60, 0))
    content = plain(recorder)
    assert content["format"] == FORMAT
    assert [step["step_id"] for step in content["steps"]] == [2, 3, 4, 5]
    (row,) = content["rows"]
    assert (row["row"], row["request_id"], row["num_tokens"], row["tables"]) == (3, "early", 3, [[3]])
    released = StepPlan(step_id=6, released=[3])
    for plan in (released, prefill(7, 3, "late"), *(decode(step, 3, step) for step in range(8, 11))):
        recorder.record(plan, 0.001, (1, 0, 60, 0))
    assert plain(recorder)["rows"] == []
    assert plain(recorder)["steps"][0]["admitted"][0]["request_id"] == "late"


def test_no_text_and_no_token_without_consent():
    recorder = FlightRecorder(1)
    forced = StepPlan(step_id=1, token_updates=[TokenUpdate(0, 3, (SECRET, SECRET))])
    for plan in (prefill(0, 0, "a"), forced):
        recorder.record(plan, 0.0, (1, 0, 0, 0))
    text = json.dumps(plain(recorder))
    assert str(SECRET) not in text
    assert "secret words" not in text
    assert plain(recorder)["steps"][-1]["token_updates"] == [[0, 3, 2]]


def test_with_consent_tokens_are_followed_through_the_fold():
    recorder = FlightRecorder(1, with_tokens=True)
    decodes = [(decode(step, 0, 2 + step), [11 + step]) for step in range(1, 6)]
    for plan, sampled in ((prefill(0, 0, "a"), [11]), *decodes):
        recorder.record(plan, 0.0, (1, 0, 0, 0)).token_ids = sampled
    content = plain(recorder)
    assert content["rows"][0]["token_ids"] == [SECRET, 7, 8, 11, 12]
    assert content["steps"][0]["token_ids"] == [13]


async def test_an_engine_dumps_what_it_did_and_goes_on(tmp_path):
    health = HealthConfig(state_dir=str(tmp_path), max_flight_records=2)
    async with running(health=health) as (engine, sink, _):
        for index in range(4):
            engine.add(request(f"r{index}"))
            await sink.end(f"r{index}")
            path = await engine.dump("SIGQUIT")
        content = json.loads(path.read_bytes())
        assert content["steps"][-1]["commit_s"] > 0
        assert content["stats"]["num_output_tokens"] == 24
        assert any(name.startswith("MainThread") for name in content["threads"])
        engine.add(request("still"))
        await sink.end("still")
    assert len(list(tmp_path.glob("flight-*.json"))) == 2


async def test_a_disk_that_refuses_costs_one_line(tmp_path, caplog):
    folder = tmp_path / "state"
    async with running(health=HealthConfig(state_dir=str(folder))) as (engine, sink, _):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        assert await engine.dump("SIGQUIT") is None
        engine.add(request("a"))
        await sink.end("a")
    assert sum("cannot be written" in line for line in caplog.messages) == 1


def test_state_folder_reads_what_it_wrote_and_nothing_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    folder = StateFolder.find(None)
    assert folder is not None
    assert folder.path == tmp_path / "a"
    assert folder.read("none.json") == {}
    folder.write("some.json", {"one": 1})
    assert folder.read("some.json") == {"one": 1}
    (folder.path / "some.json").write_text("garbage")
    assert folder.read("some.json") == {}
    assert "some.json cannot be read" in caplog.text
    monkeypatch.delenv("STATE_DIRECTORY")
    assert StateFolder.find(None) is None
    (tmp_path / "file").touch()
    assert StateFolder.find(str(tmp_path / "file")) is None
