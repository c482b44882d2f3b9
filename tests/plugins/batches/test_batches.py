"""Files and batches through the official client: answers, restarts, cancelling, bounds, owners, paths that lead out."""

from __future__ import annotations

import asyncio
import io
import json
import os
from contextlib import asynccontextmanager
from types import SimpleNamespace

import openai
import pytest
from scripted import make_folder, scripted
from server.serving import call, serving, summaries_of, until

from llmd_plugins import anthropic as anthropic_plugin
from llmd_plugins import batches as plugin
from llmd_plugins import openai as openai_plugin
from llmd_plugins import pooling as pooling_plugin
from llmd_plugins import responses as responses_plugin
from llmd_plugins.batches import BatchesSettings
from llmd_plugins.batches.lines import LineError, parse_line

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("batches") / "model")


@asynccontextmanager
async def client(folder, state, settings=None, **options):
    sections = {"batches": BatchesSettings(directory=None if state is None else str(state), **(settings or {}))}
    pooling = SimpleNamespace(
        llmd_register_routes=lambda: [
            spec
            for spec in pooling_plugin.llmd_register_routes()
            if spec.path != "/classify"  # a route that is switched off
        ]
    )
    plugins = (plugin, openai_plugin, responses_plugin, anthropic_plugin, pooling)
    async with (
        scripted(folder, *plugins, sections=sections, **options) as model,
        serving(model.context) as url,
        openai.AsyncOpenAI(base_url=url + "/v1", api_key="alpha", max_retries=0) as api,
    ):
        yield api, model, url


def lines_of(count, url=CHAT, **body):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **body}
    rows = [{"custom_id": f"r{n}", "method": "POST", "url": url, "body": body} for n in range(count)]
    return "\n".join(map(json.dumps, rows)).encode()


async def upload(api, data, name="in.jsonl"):
    return await api.files.create(file=(name, io.BytesIO(data)), purpose="batch")


async def start(api, data, endpoint=CHAT):
    file = await upload(api, data)
    return await api.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


async def ended(api, batch):
    for _ in range(1500):
        batch = await api.batches.retrieve(batch.id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        await asyncio.sleep(0.02)
    raise AssertionError(batch.model_dump())


async def rows_of(api, file_id):
    return [json.loads(line) for line in (await api.files.content(file_id)).text.splitlines()]


async def test_a_batch(folder, tmp_path):
    async with client(folder, tmp_path / "state") as (api, model, _):
        seen = summaries_of(model.context)
        model.say("Hello!")
        data = lines_of(20) + b"\n\n" + lines_of(1, temperature=-1).replace(b"r0", b"bad") + b"\n"
        batch = await start(api, data)
        assert (batch.status, batch.object, batch.endpoint) == ("validating", "batch", CHAT)
        batch = await ended(api, batch)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (21, 20, 1)
        rows = await rows_of(api, batch.output_file_id)
        assert {row["custom_id"] for row in rows} == {f"r{n}" for n in range(20)}
        assert {row["response"]["body"]["choices"][0]["message"]["content"] for row in rows} == {"Hello!"}
        (error,) = await rows_of(api, batch.error_file_id)
        assert (error["custom_id"], error["response"]["status_code"]) == ("bad", 400)
        assert error["response"]["body"]["error"]["param"] == "temperature"
        answered = [summary for summary in seen if summary.route == CHAT]
        assert len(answered) == 21
        assert sorted(summary.status for summary in answered) == [200] * 20 + [400]
        assert [one.id for one in (await api.batches.list()).data] == [batch.id]
        files = (await api.files.list()).data
        assert {one.purpose for one in files} == {"batch", "batch_output"}
        assert not list((tmp_path / "state").rglob(".*"))
        assert not list((tmp_path / "state" / "batches").glob("*.output"))


async def test_completions_and_responses(folder, tmp_path):
    async with client(folder, tmp_path) as (api, model, _):
        model.say("Hello!")
        row = {"custom_id": "a", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "x", "max_tokens": 3}}
        batch = await ended(api, await start(api, json.dumps(row).encode(), "/v1/completions"))
        assert batch.request_counts.completed == 1
        row = {"custom_id": "a", "url": "/v1/responses", "body": {"model": "tiny", "input": "x"}}
        batch = await ended(api, await start(api, json.dumps(row).encode(), "/v1/responses"))
        (found,) = await rows_of(api, batch.output_file_id)
        assert found["response"]["body"]["output"][0]["content"][0]["text"] == "Hello!"


@pytest.mark.parametrize(
    ("path", "body", "right", "wrong"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 20}, "content", {"top_p": -1}),
        ("/v1/responses", {"input": "x"}, "output", {"top_p": -1}),
        ("/v1/embeddings", {"input": "x"}, "data", {"dimensions": 0}),
        ("/pooling", {"input": ["x", "y"]}, "data", {"task": "guess"}),
        ("/score", {"text_1": "x", "text_2": ["y", "z"]}, "data", {"text_2": []}),
        ("/v1/score", {"text_1": "x", "text_2": "y"}, "data", {"text_2": []}),
        ("/rerank", {"query": "x", "documents": ["y", "z"]}, "results", {"top_n": -1}),
        ("/v1/rerank", {"query": "x", "documents": ["y", "z"]}, "results", {"top_n": -1}),
        ("/v2/rerank", {"query": "x", "documents": ["y", "z"]}, "results", {"top_n": -1}),
    ],
)
async def test_every_kind_of_request(folder, tmp_path, path, body, right, wrong):
    """Each answer is what the route itself says, errors in that format's own shape."""
    async with client(folder, tmp_path) as (api, model, url):
        seen = summaries_of(model.context)
        model.say("Hello!")
        rows = [
            {"custom_id": "good", "url": path, "body": {"model": "tiny", **body}},
            {"custom_id": "bad", "url": path, "body": {"model": "tiny", **body, **wrong}},
        ]
        batch = await ended(api, await start(api, "\n".join(map(json.dumps, rows)).encode(), path))
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1), batch
        (good,), (bad,) = await rows_of(api, batch.output_file_id), await rows_of(api, batch.error_file_id)
        assert (good["custom_id"], good["response"]["status_code"]) == ("good", 200)
        assert good["response"]["body"][right]
        direct = (await call(url, "POST", path, rows[1]["body"])).json()
        told = bad["response"]["body"]
        assert (bad["response"]["status_code"], told["error"]) == (400, direct["error"])
        assert told.get("type") == direct.get("type")
        assert sum(summary.route == path for summary in seen) == 3


async def test_going_on_after_a_restart(folder, tmp_path):
    async with client(folder, tmp_path, {"max_concurrent": 2}, step_s=0.01) as (api, model, _):
        model.say("Hello!")
        batch = await start(api, lines_of(30))
        await until(
            lambda: model.context.shared["batches"].records["batches"][batch.id]["request_counts"]["completed"] > 4, 20
        )
        waiting = await start(api, lines_of(1))
    journal = tmp_path / "batches" / f"{batch.id}.output"
    num_before = len(journal.read_bytes().splitlines())
    assert 4 < num_before < 30
    with journal.open("ab") as file:
        file.write(b'{"id": "cut o')  # as a crash in the midst of a line leaves it
    async with client(folder, tmp_path) as (api, model, _):
        seen = summaries_of(model.context)
        model.say("Again")
        batch = await ended(api, batch)
        assert (batch.status, batch.request_counts.completed) == ("completed", 30)
        rows = await rows_of(api, batch.output_file_id)
        assert sorted(row["custom_id"] for row in rows) == sorted(f"r{n}" for n in range(30))
        assert (await ended(api, waiting)).status == "completed"
        assert len([summary for summary in seen if summary.route == CHAT]) == 30 - num_before + 1


async def test_cancelling(folder, tmp_path):
    async with client(folder, tmp_path, {"max_concurrent": 1}, step_s=0.01) as (api, model, _):
        model.say("Hello!")
        batch, waiting = await start(api, lines_of(200)), await start(api, lines_of(2))
        await until(
            lambda: model.context.shared["batches"].records["batches"][batch.id]["request_counts"]["completed"] > 1, 20
        )
        assert (await api.batches.cancel(waiting.id)).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="has not ended"):
            await api.files.delete(batch.input_file_id)
        assert (await api.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
        batch = await ended(api, batch)
        assert batch.status == "cancelled"
        assert 1 < len(await rows_of(api, batch.output_file_id)) < 200
        assert model.service.engine.stats().num_running == 0
        assert (await api.batches.cancel(batch.id)).status == "cancelled"
        assert (await api.files.delete(batch.input_file_id)).deleted


async def test_others_go_first(folder, tmp_path):
    async with client(folder, tmp_path, {"max_concurrent": 4}, step_s=0.005, max_num_seqs=2) as (api, model, _):
        model.say("Hello " * 20)
        batch = await start(api, lines_of(12, max_tokens=40))
        await until(lambda: model.service.engine.stats().num_running == 2, 20)
        order = []

        async def ask():
            await api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
            order.append("asked")

        await asyncio.gather(*(ask() for _ in range(4)))
        assert (await api.batches.retrieve(batch.id)).request_counts.completed < 12
        assert (await ended(api, batch)).status == "completed"


BAD_FILES = [
    (b"", "empty_file"),
    (b"nonsense", "invalid_json_line"),
    (b"[1]", "invalid_json_line"),
    (lines_of(1) + b"\n" + lines_of(1), "duplicate_custom_id"),
    (lines_of(1, url="/v1/completions"), "mismatched_url"),
    (lines_of(1, url="/admin/status"), "invalid_url"),
    (lines_of(1, stream=True), "invalid_body"),
    (lines_of(6), "too_many_tasks"),
    (b'{"custom_id": 3}', "invalid_custom_id"),
    (b'{"custom_id": "a", "method": "GET"}', "invalid_method"),
    (b'{"custom_id": "a", "url": "/v1/chat/completions", "body": 1}', "invalid_body"),
    (b'{"custom_id": "a", "url": ["/v1/chat/completions"], "body": {}}', "invalid_url"),
]


async def test_files_that_are_no_batch(folder, tmp_path):
    async with client(folder, tmp_path, {"max_requests": 5}) as (api, _, url):
        for data, code in BAD_FILES:
            batch = await ended(api, await start(api, data))
            assert (batch.status, batch.errors.data[0].code) == ("failed", code), (data, batch)
        file = await upload(api, lines_of(1))
        good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        for changes, param in (
            ({"endpoint": "/metrics"}, "endpoint"), ({"endpoint": 3}, "endpoint"), ({"endpoint": "/classify"}, "endpoint"),
            ({"endpoint": "/v1/moderations"}, "endpoint"), ({"endpoint": "/v1/images/generations"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"), ({"input_file_id": 3}, "input_file_id"),
            ({"metadata": {"a": 1}}, "metadata.a"), ({"foo": 1}, "foo"),
        ):  # fmt: skip
            answer = await call(url, "POST", "/v1/batches", {**good, **changes})
            assert (answer.status, answer.json()["error"]["param"]) == (400, param), answer.body
        unserved = (await call(url, "POST", "/v1/batches", {**good, "endpoint": "/v1/moderations"})).json()["error"]
        assert unserved["code"] == "unsupported_parameter"
        assert unserved["message"].startswith("endpoint '/v1/moderations' is not served by this server; served are /v1/chat")
        assert (await call(url, "POST", "/v1/batches", {**good, "input_file_id": "file-x"})).status == 404


async def test_uploads_are_bounded(folder, tmp_path):
    settings = {"max_file_bytes": 2000, "max_total_bytes": 3000, "max_files": 3}
    async with client(folder, tmp_path, settings) as (api, _, url):
        first = await upload(api, b"x" * 1500, name="../../etc/passwd")
        assert (first.filename, first.bytes, first.status) == ("../../etc/passwd", 1500, "processed")
        for size in (2001, 3_000_000, 1600):
            with pytest.raises(openai.APIStatusError) as large:
                await upload(api, b"x" * size)
            assert large.value.status_code == 413
        for _ in range(2):
            await upload(api, b"x")
        with pytest.raises(openai.APIStatusError, match="max_files"):
            await upload(api, b"x")
        assert (await api.files.content(first.id)).content == b"x" * 1500
        assert (await api.files.delete(first.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await api.files.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await api.files.create(file=b"x", purpose="user_data")
        assert (await call(url, "POST", "/v1/files", {"a": 1})).status == 415
        broken = {"Content-Type": "multipart/form-data; boundary=x"}
        for body in (b"", b"garbage", b"--x\r\n\r\n", b'--x\r\nContent-Disposition: form-data; name="z"\r\n\r\n1\r\n--x--'):
            assert (await call(url, "POST", "/v1/files", data=body, headers=broken)).status == 400
        kept = sorted(path.name for path in (tmp_path / "files").iterdir())
        assert len(kept) == 4
        assert {path.name for path in tmp_path.iterdir()} == {"files", "batches", "lock"}


async def test_names_are_no_paths(folder, tmp_path):
    (tmp_path / "secret.json").write_text('{"key": ""}')
    async with client(folder, tmp_path / "state") as (api, _, url):
        await upload(api, b"x")
        for name in ("..%2f..%2fsecret", "%2e%2e", "file-..%2fx", "file-" + "0" * 32, ".", "%00", "a" * 3000):
            for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
                assert (await call(url, "GET", path)).status == 404, path


async def test_owners(folder, tmp_path):
    config = {"server": {"api_keys": ["alpha", "beta"]}}
    async with client(folder, tmp_path, config=config, authenticators=True) as (api, model, _):
        seen = summaries_of(model.context)
        file = await upload(api, lines_of(1))
        other = api.with_options(api_key="beta")
        with pytest.raises(openai.NotFoundError):
            await other.files.content(file.id)
        with pytest.raises(openai.NotFoundError):
            await other.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert (await other.files.list()).data == []
        batch = await ended(api, await start(api, lines_of(1)))
        assert batch.status == "completed"
        (answered,) = [summary for summary in seen if summary.route == CHAT]
        assert answered.key.startswith("key-")
        with pytest.raises(openai.NotFoundError):
            await other.batches.retrieve(batch.id)


async def test_one_daemon_a_folder(folder, tmp_path):
    async with client(folder, tmp_path) as (api, _, _), client(folder, tmp_path) as (second, _, _):
        await upload(api, b"x")
        with pytest.raises(openai.InternalServerError, match="not usable"):
            await upload(second, b"x")


async def test_without_a_folder_nothing_is_made(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    async with client(folder, None) as (api, _, url):
        assert (await api.files.list()).data == []
        assert (await call(url, "GET", "/v1/files/file-x")).status == 404
        assert not (tmp_path / "xdg").exists()
        await upload(api, b"x")
        assert (tmp_path / "xdg" / "llmd" / "batches" / "files").is_dir()
        assert os.stat(tmp_path / "xdg" / "llmd" / "batches" / "files").st_mode & 0o077 == 0


def test_lines():
    with pytest.raises(LineError, match="background"):
        parse_line(b'{"custom_id": "a", "url": "/v1/responses", "body": {"background": true}}')
