"""One log line for each ended request, however it ended; probes of /health and the like only at level debug."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import RequestSummary, ServiceSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import Config

logger = logging.getLogger("llmd.access")

_PROBES = frozenset({"/health", "/ready", "/version", "/metrics", "/admin/status", "/admin/requests"})


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}ms"


def line(summary: RequestSummary) -> str:
    """The same for people: `POST /v1/completions 200 12.3ms model=… tokens=5+20 ttft=… finish=stop`."""
    parts = [summary.facts.get("method", "-"), summary.route or "(unknown path)", str(summary.status), _ms(summary.e2e_s)]
    if summary.model:
        parts.append(f"model={summary.model}")
    if summary.adapter:
        parts.append(f"adapter={summary.adapter}")
    if summary.key:
        parts.append(f"key={summary.key}")
    if summary.finish_reasons or summary.num_prompt_tokens:
        tokens = f"{summary.num_prompt_tokens}({summary.num_cached_tokens} cached)+{summary.num_output_tokens}"
        ends = ",".join(dict.fromkeys(summary.finish_reasons)) or "none"
        parts.append(f"tokens={tokens} queue={_ms(summary.queue_s)} ttft={_ms(summary.ttft_s)} finish={ends}")
    if summary.num_preemptions:
        parts.append(f"preemptions={summary.num_preemptions}")
    if error := summary.facts.get("error"):
        parts.append(f"error={str(error)[:200]!r}")
    return " ".join(parts)


@hookimpl
def llmd_request_finished(summary: RequestSummary) -> None:
    """Write the line."""
    is_expected = summary.status < 500 or summary.route == "/ready"
    level = logging.DEBUG if summary.route in _PROBES and is_expected else logging.INFO
    if logger.isEnabledFor(level):
        logger.log(level, "%s", line(summary), extra=summary.fields())


@asynccontextmanager
async def _switch(context: Any) -> AsyncIterator[None]:
    """`log.access` false: the lines are switched off while this server runs."""
    before, logger.disabled = logger.disabled, not context.config.log.access
    try:
        yield
    finally:
        logger.disabled = before


@hookimpl
def llmd_reloaded(config: Config) -> None:
    """`log.access` may change while serving."""
    logger.disabled = not config.log.access


@hookimpl
def llmd_register_services() -> list[ServiceSpec]:
    """Obeys the configuration."""
    return [ServiceSpec(name="access_log", summary="switches the access log", build=_switch)]
