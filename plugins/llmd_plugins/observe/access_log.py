"""One log line for each ended request, however it ended; probes of /health and the like only at level debug."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from llmd.api.v1 import RequestSummary, ServiceSpec, hookimpl

logger = logging.getLogger("llmd.access")

_PROBES = frozenset({"/health", "/ready", "/version", "/metrics"})


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}ms"


def fields(summary: RequestSummary) -> dict[str, Any]:
    """What a JSON line holds beside its message; the request's id is the record's own."""
    return {
        "request_id": summary.request_id,
        "method": summary.facts.get("method", ""),
        "route": summary.route,
        "status": summary.status,
        "model": summary.model,
        "key": summary.key,
        "prompt_tokens": summary.num_prompt_tokens,
        "cached_tokens": summary.num_cached_tokens,
        "output_tokens": summary.num_output_tokens,
        "queue_s": round(summary.queue_s, 6),
        "ttft_s": None if summary.ttft_s is None else round(summary.ttft_s, 6),
        "e2e_s": round(summary.e2e_s, 6),
        "finish_reasons": list(summary.finish_reasons),
        "client_gone": summary.client_gone,
        "error": summary.facts.get("error"),
    }


def line(summary: RequestSummary) -> str:
    """The same for people: `POST /v1/completions 200 12.3ms model=… tokens=5+20 ttft=… finish=stop`."""
    parts = [summary.facts.get("method", "-"), summary.route or "(unknown path)", str(summary.status), _ms(summary.e2e_s)]
    if summary.model:
        parts.append(f"model={summary.model}")
    if summary.key:
        parts.append(f"key={summary.key}")
    if summary.finish_reasons or summary.num_prompt_tokens:
        tokens = f"{summary.num_prompt_tokens}({summary.num_cached_tokens} cached)+{summary.num_output_tokens}"
        ends = ",".join(dict.fromkeys(summary.finish_reasons)) or "none"
        parts.append(f"tokens={tokens} queue={_ms(summary.queue_s)} ttft={_ms(summary.ttft_s)} finish={ends}")
    if error := summary.facts.get("error"):
        parts.append(f"error={str(error)[:200]!r}")
    return " ".join(parts)


@hookimpl
def llmd_request_finished(summary: RequestSummary) -> None:
    """Write the line."""
    is_expected = summary.status < 500 or summary.route == "/ready"
    level = logging.DEBUG if summary.route in _PROBES and is_expected else logging.INFO
    if logger.isEnabledFor(level):
        logger.log(level, "%s", line(summary), extra=fields(summary))


@asynccontextmanager
async def _switch(context: Any) -> AsyncIterator[None]:
    """`log.access` false: the lines are switched off while this server runs."""
    before, logger.disabled = logger.disabled, not context.config.log.access
    try:
        yield
    finally:
        logger.disabled = before


@hookimpl
def llmd_register_services() -> list[ServiceSpec]:
    """Obeys the configuration."""
    return [ServiceSpec(name="access_log", summary="switches the access log", build=_switch)]
