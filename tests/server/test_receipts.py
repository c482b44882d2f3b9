"""Receipts: what the client may ask for, what operators find while a request runs and after it has ended."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from server.serving import FakeService, all_routes, call, make_config, make_context, serving, summaries_of, until

from llmd.engine.step import FinishReason
from llmd.server.receipts import RequestLog, live_row, names_of, phase_of
from llmd_plugins.responses import llmd_register_routes as responses_routes

ADMIN = {"Authorization": "Bearer admin"}
CHAT = {"messages": [{"role": "user", "content": "hi there"}]}


class Outputs:
    """Ends requests as OutputProcessor does."""

    def __init__(self, service):
        self.service = service

    def abort(self, request_id, error):
        for stream in self.service.streams:
            if stream.request.request_id == request_id:
                self.service.fail_as, self.service.fail_with, self.service.fail_at = FinishReason.ABORT, error, 1


def service_with_sequences(**changes):
    """A FakeService whose streams have sequences like the engine's."""
    service = FakeService(**changes)
    service.outputs = Outputs(service)
    generate = service.generate

    async def with_sequences(*arguments, **options):
        stream = await generate(*arguments, **options)
        stream.sequences = [sequence_of(stream.request) for _ in range(stream.request.num_sequences)]
        return stream

    service.generate = with_sequences
    return service


def sequence_of(request, **changes):
    values = {
        "request": request, "num_preemptions": 1, "num_steps": 7, "first_scheduled_s": request.arrival_s + 0.25,
        "num_output_tokens": 0, "is_finished": False,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def admin_context(service, **server):
    return make_context(service, config=make_config(admin_keys=("admin",), **server))


async def test_a_whole_answer_tells_its_receipt_when_asked():
    context = make_context(service_with_sequences())
    seen = summaries_of(context)
    async with serving(context) as url:
        told = await call(url, "POST", "/v1/chat/completions", CHAT, headers={"X-Llmd-Receipt": "true"})
        untold = await call(url, "POST", "/v1/chat/completions", CHAT)
    receipt = json.loads(told.headers["X-Llmd-Receipt"])
    expected = {name: value for name, value in seen[0].fields().items() if name in receipt}
    assert receipt == expected
    assert receipt["output_tokens"] == 8
    assert receipt["steps"] == 7
    assert receipt["preemptions"] == 1
    assert receipt["queue_ms"] >= 250
    assert [part.partition(";")[0] for part in told.headers["Server-Timing"].split(", ")] == [
        "queue",
        "prefill",
        "decode",
        "total",
    ]
    assert "X-Llmd-Receipt" not in untold.headers
    assert "Server-Timing" not in untold.headers


async def test_a_refused_request_tells_its_receipt_too():
    async with serving(make_context()) as url:
        answer = await call(url, "POST", "/v1/completions", {"prompt": "x", "wrong": 1}, headers={"X-Llmd-Receipt": "1"})
    assert answer.status == 400
    assert json.loads(answer.headers["X-Llmd-Receipt"])["status"] == 400


async def test_a_stream_ends_with_its_receipt_as_a_comment():
    async with serving(make_context(service_with_sequences())) as url:
        body = CHAT | {"stream": True}
        answer = await call(url, "POST", "/v1/chat/completions", body, headers={"X-Llmd-Receipt": "true"})
        plain = await call(url, "POST", "/v1/chat/completions", body)
    assert b": receipt" not in plain.body
    frames = answer.body.decode().split("\n\n")
    assert frames[-3] == "data: [DONE]"
    receipt = json.loads(frames[-2].removeprefix(": receipt "))
    assert receipt["finish_reasons"] == ["length"]
    assert receipt["output_tokens"] == 8


async def test_the_callers_trace_is_kept_where_it_is_well_formed():
    context = make_context()
    seen = summaries_of(context)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serving(context) as url:
        await call(url, "GET", "/version", headers={"traceparent": parent, "tracestate": "a=1"})
        await call(url, "GET", "/version", headers={"traceparent": "nonsense", "tracestate": "a=1"})
        await call(url, "GET", "/version", headers={"traceparent": parent, "tracestate": "a" * 600})
    assert (seen[0].facts["traceparent"], seen[0].facts["tracestate"]) == (parent, "a=1")
    assert "traceparent" not in seen[1].facts
    assert "tracestate" not in seen[2].facts


async def test_operators_see_running_requests_and_ended_ones():
    service = service_with_sequences(step_s=0.1)
    async with serving(admin_context(service)) as url:
        headers = {"X-Request-Id": "mine-1"}
        asking = asyncio.ensure_future(call(url, "POST", "/v1/chat/completions", CHAT, headers=headers))
        await until(lambda: service.streams and service.streams[0].first_token_s)
        status = (await call(url, "GET", "/admin/status", headers=ADMIN)).json()
        (row,) = status["requests"]
        assert (row["request_id"], row["phase"], row["model"], row["prompt_tokens"]) == ("mine-1", "decode", "fake", 3)
        assert (status["keys"][0]["key"], status["keys"][0]["running"], status["adapters"]) == ("(anonymous)", 1, [])
        running = (await call(url, "GET", "/admin/requests/chatcmpl-mine-1", headers=ADMIN)).json()
        assert running["state"] == "running"
        assert (await asking).status == 200
        ended = (await call(url, "GET", "/admin/requests/mine-1", headers=ADMIN)).json()
        assert (ended["state"], ended["status"], ended["finish_reasons"]) == ("ended", 200, ["length"])
        listed = (await call(url, "GET", "/admin/requests?limit=1", headers=ADMIN)).json()
        assert (listed["num_requests"], listed["requests"]) == (0, [])
        assert [row["request_id"] for row in listed["recent"]] == ["mine-1"]
        status = (await call(url, "GET", "/admin/status", headers=ADMIN)).json()
        assert (status["keys"][0]["requests"], status["keys"][0]["running"]) == (1, 0)


async def test_an_operator_ends_a_request_and_its_client_is_told():
    service = service_with_sequences(step_s=0.1)
    async with serving(admin_context(service)) as url:
        headers = {"X-Request-Id": "victim"}
        asking = asyncio.ensure_future(call(url, "POST", "/v1/chat/completions", CHAT, headers=headers))
        await until(lambda: service.streams)
        answer = await call(url, "POST", "/admin/abort", {"request_id": "victim"}, headers=ADMIN)
        assert (answer.status, answer.json()) == (200, {"request_id": "victim", "aborted": 1})
        refused = await asking
        assert refused.status == 503
        assert refused.json()["error"]["message"] == "the request was aborted by an operator"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "word"),
    [
        ("GET", "/admin/requests/nobody", None, 404, "log.recent_requests"),
        ("GET", "/admin/requests?limit=0", None, 400, "between 1 and 1000"),
        ("GET", "/admin/requests?limit=x", None, 400, "between 1 and 1000"),
        ("POST", "/admin/abort", {"request_id": "nobody"}, 404, "nobody"),
        ("POST", "/admin/abort", {"request_id": 3}, 400, "request_id"),
        ("POST", "/admin/abort", {}, 400, "request_id"),
    ],
)
async def test_mistakes_are_told(method, path, body, status, word):
    async with serving(admin_context(FakeService())) as url:
        answer = await call(url, method, path, body, headers=ADMIN)
        assert (await call(url, method, path, body)).status in (401, 403)
    assert answer.status == status
    assert word in answer.json()["error"]["message"]


async def test_background_work_is_seen_and_recorded_once():
    context = make_context(service_with_sequences(step_s=0.02), routes=[*all_routes(), *responses_routes()])
    context.sections |= {"responses": _responses_settings()}
    seen = summaries_of(context)
    async with serving(context) as url:
        answer = await call(url, "POST", "/v1/responses", {"input": "hi", "background": True})
        assert answer.status == 200
        await until(lambda: any(summary.facts.get("background") for summary in seen))
    assert sum(bool(summary.facts.get("background")) for summary in seen) == 1
    assert context.requests.live() == []


def _responses_settings():
    from llmd_plugins import responses

    (spec,) = responses.llmd_register_config_sections()
    return spec.model()


def summary(request_id, model="demo", status=200):
    return SimpleNamespace(request_id=request_id, model=model, status=status, fields=lambda: {"request_id": request_id})


def receipt(request_id="r", streams=()):
    return SimpleNamespace(
        request_id=request_id, streams=list(streams), route="/x", model="demo", key="k", started_s=0.0
    )  # fmt: skip


def test_the_log_is_bounded_and_forgets_probes():
    log = RequestLog(3)
    for index in range(5):
        log.keep(summary(f"r{index}"))
    log.keep(summary("r3"))
    log.keep(summary("probe", model=""))
    log.keep(summary("bad", model="", status=400))
    assert [row["request_id"] for row in log.recent(10)] == ["bad", "r3", "r4"]
    assert log.ended("r0") is None
    silent = RequestLog(0)
    silent.keep(summary("r"))
    assert silent.recent(10) == []


def test_an_id_in_use_twice_finds_both():
    log = RequestLog(3)
    first, second = receipt("same"), receipt("same")
    log.open(first)
    log.open(second)
    assert log.find("cmpl-same") == [first, second]
    assert log.live() == []
    log.close(first)
    assert log.find("same") == [second]


def test_ids_of_answers_lead_to_the_request():
    assert "abc" in set(names_of("chatcmpl-abc"))
    assert "abc" in set(names_of("msg_abc-7f01"))
    assert "mine-1" in set(names_of("chatcmpl-mine-1"))
    assert next(names_of("a-b")) == "a-b"


def stream_of(*sequences, first_token_s=None):
    request = SimpleNamespace(prompt=(1, 2), adapter="sql")
    return SimpleNamespace(
        request=request, sequences=sequences, first_token_s=first_token_s, num_cached_tokens=1, num_output_tokens=3
    )


@pytest.mark.parametrize(
    ("stream", "phase"),
    [
        (None, "reading"),
        (stream_of(SimpleNamespace(first_scheduled_s=None, is_finished=False, num_preemptions=0)), "queue"),
        (stream_of(SimpleNamespace(first_scheduled_s=1.0, is_finished=False, num_preemptions=0)), "prefill"),
        (
            stream_of(SimpleNamespace(first_scheduled_s=1.0, is_finished=False, num_preemptions=2), first_token_s=2.0),
            "decode",
        ),
        (
            stream_of(SimpleNamespace(first_scheduled_s=1.0, is_finished=True, num_preemptions=0), first_token_s=2.0),
            "ending",
        ),
        (stream_of(first_token_s=2.0), "decode"),
    ],
)
def test_phases(stream, phase):
    found = receipt(streams=[stream] if stream else [])
    assert phase_of(found) == phase
    row = live_row(found)
    assert row["adapter"] == ("sql" if stream else "")
    assert row["sequences"] == (len(stream.sequences) if stream else 0)
