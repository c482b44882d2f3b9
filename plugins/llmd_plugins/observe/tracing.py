"""OpenTelemetry spans of every request that reached a model, with the phases queue, prefill and decode as children.

Attributes follow the GenAI semantic conventions; what those have no name for is led by `llmd.`. Spans are made of the
receipt when a request has ended, so nothing runs while tokens do. `log.otlp_traces_endpoint` switches it on; the SDK's own
OTEL_… variables (sampler, headers, service name) count. Needs the `otel` extra.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from llmd.api.v1 import RequestSummary, ServiceSpec, hookimpl

logger = logging.getLogger("llmd.tracing")

_EXPORT_TIMEOUT_S = 5
_LAST_WORDS_S = 3.0  # for the spans that are still to be sent when the daemon stops
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_running: list[Tracing] = []


def traces_url(endpoint: str) -> str:
    """Where to POST: an endpoint without a path gets the one that OTLP over HTTP prescribes."""
    return endpoint.rstrip("/") + "/v1/traces" if urlsplit(endpoint).path in ("", "/") else endpoint


def attributes(summary: RequestSummary) -> dict[str, Any]:
    """What the request's span tells."""
    found = {
        "gen_ai.operation.name": _OPERATIONS.get(summary.route),
        "gen_ai.provider.name": "llmd",
        "gen_ai.request.model": summary.model,
        "gen_ai.response.model": summary.model,
        "gen_ai.response.id": summary.request_id,
        "gen_ai.response.finish_reasons": summary.finish_reasons or None,
        "gen_ai.response.time_to_first_chunk": summary.ttft_s,
        "gen_ai.request.choice.count": max(summary.facts.get("n", ()), default=None),
        "gen_ai.request.max_tokens": max(summary.facts.get("max_tokens", ()), default=None),
        "gen_ai.usage.input_tokens": summary.num_prompt_tokens,
        "gen_ai.usage.output_tokens": summary.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": summary.num_cached_tokens,
        "http.request.method": summary.facts.get("method"),
        "http.route": summary.route,
        "http.response.status_code": summary.status,
        "llmd.key": summary.key or None,
        "llmd.adapter": summary.adapter or None,
        "llmd.steps": summary.num_steps,
        "llmd.preemptions": summary.num_preemptions,
        "llmd.client_gone": summary.client_gone or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def phases(summary: RequestSummary) -> Iterator[tuple[str, float, float]]:
    """Each phase with its beginning and end in seconds after the arrival."""
    if summary.queue_s:
        yield "queue", 0.0, summary.queue_s
    if summary.prefill_s is None or summary.ttft_s is None:
        return
    yield "prefill", summary.queue_s, summary.ttft_s
    if summary.decode_s is not None:
        yield "decode", summary.ttft_s, summary.e2e_s


class Tracing:
    """Makes spans of receipts. `provider` is the SDK's TracerProvider."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self._trace = trace
        self._tracer = provider.get_tracer("llmd")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, summary: RequestSummary) -> None:
        """The spans of one ended request; a child of the caller's where it told its own."""
        trace = self._trace
        span = self._tracer.start_span(
            f"{_OPERATIONS.get(summary.route, summary.route)} {summary.model}",
            context=self._propagator.extract(summary.facts),
            kind=trace.SpanKind.SERVER,
            attributes=attributes(summary),
            start_time=_ns(summary.arrived_s),
        )
        if summary.status >= 500:
            span.set_status(trace.Status(trace.StatusCode.ERROR, str(summary.facts.get("error") or "")[:200]))
            span.set_attribute("error.type", str(summary.status))
        inside = trace.set_span_in_context(span)
        for name, start_s, end_s in phases(summary):
            child = self._tracer.start_span(name, context=inside, start_time=_ns(summary.arrived_s + start_s))
            child.end(_ns(summary.arrived_s + end_s))
        span.end(_ns(summary.arrived_s + summary.e2e_s))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def make_provider(endpoint: str) -> Any:
    """A provider that sends to an OTLP collector in batches, from a thread. Raises ImportError without the extra."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create().merge(_own_resource(Resource)), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _own_resource(resource: Any) -> Any:
    """The service's name, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say another."""
    import os

    told = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return resource({} if told else {"service.name": "llmd"})


@asynccontextmanager
async def _run(context: Any) -> AsyncIterator[None]:
    import asyncio  # commands that load plugins have no loop

    endpoint = context.config.log.otlp_traces_endpoint
    tracing = await asyncio.to_thread(_start, endpoint) if endpoint else None
    if tracing is None:
        yield
        return
    _running.append(tracing)
    try:
        yield
    finally:
        _running.remove(tracing)
        await _stop(tracing)


def _start(endpoint: str) -> Tracing | None:
    """Ready to send; None, told once, where the SDK is not installed."""
    try:
        tracing = Tracing(make_provider(endpoint))
    except ImportError as error:
        logger.warning("log.otlp_traces_endpoint is set and nothing is traced: %s (pip install 'llmd[otel]')", error)
        return None
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # its tries to reach a collector are no news, giving up is
    logger.info("traces go to %s", traces_url(endpoint))
    return tracing


async def _stop(tracing: Tracing) -> None:
    """Send what is left, as far as the collector answers in time; a thread that nobody waits for when it does not."""
    import asyncio

    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def work() -> None:
        tracing.provider.shutdown()
        with suppress(RuntimeError):  # the loop is closed: the daemon did not wait
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=work, name="llmd-last-spans", daemon=True).start()
    with suppress(TimeoutError):
        await asyncio.wait_for(done.wait(), _LAST_WORDS_S)


@hookimpl
def llmd_request_finished(summary: RequestSummary) -> None:
    """Make the spans of a request that reached a model."""
    if summary.model:
        for tracing in _running:
            tracing.record(summary)


@hookimpl
def llmd_register_services() -> list[ServiceSpec]:
    """The exporter."""
    return [ServiceSpec(name="tracing", summary="sends OpenTelemetry spans to a collector", build=_run)]
