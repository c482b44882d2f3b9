"""Spans of requests, in memory and over HTTP to a collector of our own."""

from __future__ import annotations

import asyncio
import builtins
import logging
import time

import pytest
from aiohttp import web
from server.serving import FakeService, call, make_context, serving, until

from llmd.config import Config
from llmd.flags import parse_flags
from llmd.plugin.specs import RequestSummary
from llmd_plugins.observe import tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def summary(**changes):
    values = {
        "request_id": "abc", "model": "demo", "key": "ann", "route": "/v1/chat/completions", "status": 200,
        "finish_reasons": ("stop",), "num_prompt_tokens": 5, "num_cached_tokens": 2, "num_output_tokens": 7,
        "queue_s": 0.5, "ttft_s": 1.25, "e2e_s": 3.0, "arrived_s": 1000.0, "prefill_s": 0.75, "decode_s": 1.75,
        "num_steps": 9, "facts": {"method": "POST", "n": [1], "max_tokens": [16]},
    }  # fmt: skip
    return RequestSummary(**{**values, **changes})


@pytest.fixture
def spans():
    """A Tracing, and what it has made."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield tracing.Tracing(provider), exporter.get_finished_spans
    provider.shutdown()


def test_a_request_has_its_phases_as_children(spans):
    made, finished = spans
    made.record(summary())
    found = {span.name: span for span in finished()}
    root = found["chat demo"]
    assert root.kind.name == "SERVER"
    assert (root.start_time, root.end_time) == (1000 * 10**9, 1003 * 10**9)
    assert root.parent is None
    bounds = {name: (found[name].start_time - root.start_time, found[name].end_time - root.start_time)
              for name in ("queue", "prefill", "decode")}  # fmt: skip
    assert bounds == {
        "queue": (0, 500_000_000),
        "prefill": (500_000_000, 1_250_000_000),
        "decode": (1_250_000_000, 3 * 10**9),
    }
    assert all(found[name].parent.span_id == root.context.span_id for name in bounds)


def test_attributes_follow_the_conventions():
    found = tracing.attributes(summary(adapter="sql"))
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == "demo"
    assert found["gen_ai.usage.input_tokens"] == 5
    assert found["gen_ai.usage.output_tokens"] == 7
    assert found["gen_ai.usage.cache_read.input_tokens"] == 2
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert found["gen_ai.response.id"] == "abc"
    assert found["gen_ai.request.max_tokens"] == 16
    assert found["http.response.status_code"] == 200
    assert (found["llmd.key"], found["llmd.adapter"], found["llmd.steps"]) == ("ann", "sql", 9)
    assert not any(value is None for value in found.values())


def test_the_callers_trace_goes_on(spans):
    made, finished = spans
    made.record(summary(facts={"method": "POST", "traceparent": PARENT, "tracestate": "a=1"}))
    root = finished()[-1]
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert root.context.trace_state["a"] == "1"


def test_a_request_that_never_ran_has_no_phases_it_did_not_reach(spans):
    made, finished = spans
    made.record(summary(queue_s=0.0, prefill_s=None, ttft_s=None, decode_s=None, status=500, facts={"error": "NaN logits"}))
    (root,) = finished()
    assert root.status.status_code.name == "ERROR"
    assert root.status.description == "NaN logits"
    assert root.attributes["error.type"] == "500"


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("http://localhost:4318/", "http://localhost:4318/v1/traces"),
        ("https://collector/otlp/v1/traces", "https://collector/otlp/v1/traces"),
    ],
)
def test_an_endpoint_without_a_path_gets_the_prescribed_one(endpoint, url):
    assert tracing.traces_url(endpoint) == url


def test_the_flag_has_vllms_name():
    parsed = parse_flags(["demo", "--otlp-traces-endpoint", "http://localhost:4318"])
    assert not parsed.problems
    assert [(setting.path, setting.value) for setting in parsed.settings if setting.path[0] == "log"] == [
        (("log", "otlp_traces_endpoint"), "http://localhost:4318")
    ]


def tracing_config(endpoint):
    return Config.model_validate({"log": {"otlp_traces_endpoint": endpoint}})


async def test_a_collector_receives_the_spans():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received = []

    async def collect(request):
        import gzip

        body = await request.read()
        received.append(gzip.decompress(body) if request.headers.get("Content-Encoding") == "gzip" else body)
        return web.Response(body=b"", content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
    context = make_context(
        FakeService(), config=tracing_config(endpoint), service_specs=tracing.llmd_register_services(),
        request_finished=lambda summary: tracing.llmd_request_finished(summary),
    )  # fmt: skip
    async with serving(context) as url:
        body = {"prompt": "hello", "max_tokens": 4}
        await call(url, "POST", "/v1/completions", body, headers={"traceparent": PARENT})
        await call(url, "GET", "/version")
    await until(lambda: received)  # leaving the server sends what is left
    await runner.cleanup()
    message = ExportTraceServiceRequest.FromString(b"".join(received))
    (resource,) = message.resource_spans
    assert {entry.key: entry.value.string_value for entry in resource.resource.attributes}["service.name"] == "llmd"
    found = [span for scope in resource.scope_spans for span in scope.spans]
    roots = [span for span in found if span.name == "text_completion fake"]
    assert len(roots) == 1
    assert roots[0].trace_id.hex() == PARENT.split("-")[1]
    assert tracing._running == []


async def test_a_collector_that_is_gone_holds_nobody_up(monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setattr(tracing, "_LAST_WORDS_S", 0.2)
    context = make_context(
        FakeService(), config=tracing_config("http://127.0.0.1:9"), service_specs=tracing.llmd_register_services(),
        request_finished=lambda summary: tracing.llmd_request_finished(summary),
    )  # fmt: skip
    async with serving(context) as url:
        began_s = time.monotonic()
        assert (await call(url, "POST", "/v1/completions", {"prompt": "hello", "max_tokens": 4})).status == 200
    assert time.monotonic() - began_s < 3
    assert tracing._running == []


async def test_a_missing_sdk_is_told_once_and_nothing_else_breaks(monkeypatch, caplog):
    really_import = builtins.__import__

    def without_sdk(name, *arguments, **options):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ImportError(f"No module named {name!r}")
        return really_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_sdk)
    context = make_context(config=tracing_config("http://127.0.0.1:9"))
    (spec,) = tracing.llmd_register_services()
    with caplog.at_level(logging.WARNING, "llmd.tracing"):
        async with spec.build(context):
            tracing.llmd_request_finished(summary())
    (record,) = caplog.records
    assert "llmd[otel]" in record.getMessage()


async def test_without_an_endpoint_nothing_runs():
    (spec,) = tracing.llmd_register_services()
    async with spec.build(make_context()):
        await asyncio.sleep(0)
        assert tracing._running == []
