"""Is the daemon alive, is it ready, which version is it, and its figures."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd._version import __version__
from llmd.metrics import CONTENT_TYPE
from llmd.plugin.specs import RouteSpec
from llmd.server.errors import json_response

if TYPE_CHECKING:
    from llmd.server.app import ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _health(context: ServerContext) -> Handler:
    async def health(request: web.Request) -> web.Response:
        failed = [model.names[0] for model in context.models() if model.state == "failed" or _has_failed(model)]
        if context.state == "failed" or failed:
            return json_response({"status": "failed", "models": failed}, 503)
        serving = [model for model in context.models() if model.state != "loading"]
        reasons = {model.names[0]: why for model in serving if (why := model.engine.pulse.why_not_alive()) is not None}
        if reasons:
            return json_response({"status": "stalled", "models": list(reasons), "reasons": reasons}, 503)
        return json_response({"status": "ok"})

    return health


def _has_failed(model: Any) -> bool:
    return model.state != "loading" and model.engine.failure is not None


def _model_row(model: Any) -> dict[str, Any]:
    progress = model.progress
    percentage = 100.0 if model.state == "ready" else round(100 * progress.fraction, 1)
    row = {"model": model.names[0], "state": model.state, "phase": progress.phase, "percentage": percentage}
    if model.state == "loading":
        return row
    stats = model.engine.stats()
    queue = {"running": stats.num_running, "waiting": stats.num_waiting, "waiting_tokens": stats.num_waiting_tokens}
    return row | {"queue": queue}


def _ready(context: ServerContext) -> Handler:
    async def ready(request: web.Request) -> web.Response:
        rows = [_model_row(model) for model in context.models()]
        waiting = [row for row in rows if row["state"] != "ready"]
        state = waiting[0]["state"] if context.state == "ready" and waiting else context.state
        if state == "ready":
            return json_response({"status": "ready", "models": rows})
        phase = waiting[0]["phase"] if waiting else context.progress.phase
        percentages = [row["percentage"] for row in rows]
        overall = sum(percentages) / len(rows) if rows else 100 * context.progress.fraction
        answer = {"status": state, "phase": phase, "percentage": round(overall, 1), "models": rows}
        response = json_response(answer, 503)
        response.headers["Retry-After"] = "1"
        return response

    return ready


def _version(context: ServerContext) -> Handler:
    async def version(request: web.Request) -> web.Response:
        return json_response({"version": __version__})

    return version


def _metrics(context: ServerContext) -> Handler:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=context.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return metrics


def _operation(summary: str, statuses: dict[str, str], kind: str = "application/json") -> Callable[[], dict[str, Any]]:
    schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
    responses = {status: {"description": text, "content": {kind: {"schema": schema}}} for status, text in statuses.items()}
    return lambda: {"summary": summary, "tags": ["server"], "responses": responses}


def routes() -> list[RouteSpec]:
    """The server's own routes for supervisors and dashboards."""
    return [
        RouteSpec(
            name="server.health", summary="is the daemon alive", method="GET", path="/health", build=_health,
            openapi=_operation("Is it alive", {"200": "alive", "503": "the device is gone, or gives no sign of life"}),
        ),
        RouteSpec(
            name="server.ready", summary="can it serve, and how far is it", method="GET", path="/ready", build=_ready,
            openapi=_operation("Can it serve", {"200": "yes", "503": "not yet, or no more: phase and percentage"}),
        ),
        RouteSpec(
            name="server.version", summary="which version runs", method="GET", path="/version", build=_version,
            openapi=_operation("Which version runs", {"200": "the version"}),
        ),
        RouteSpec(
            name="server.metrics", summary="figures for Prometheus", method="GET", path="/metrics", build=_metrics,
            openapi=_operation("Figures for Prometheus", {"200": "text exposition"}, "text/plain"),
        ),
    ]  # fmt: skip
