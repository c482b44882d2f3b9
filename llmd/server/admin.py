"""Routes for operators: they ask for an admin key, and are refused where none is configured."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd._version import __version__
from llmd.errors import InvalidRequest
from llmd.metrics import ANONYMOUS, Usage
from llmd.plugin.specs import RouteSpec
from llmd.server.admin_operations import operation
from llmd.server.body import read_json_object
from llmd.server.errors import RequestRefused, json_response
from llmd.server.middleware import receipt_of
from llmd.server.receipts import adapter_of, live_row

if TYPE_CHECKING:
    from llmd.engine.adapter_slots import AdapterInfo
    from llmd.server.app import ServerContext
    from llmd.server.generate import ModelService
    from llmd.server.middleware import Receipt

log = logging.getLogger("llmd.admin")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_MAX_ROWS = 1000  # of requests in one answer
_STARTED_S = time.monotonic()


def _plugins(context: ServerContext) -> Handler:
    async def plugins(request: web.Request) -> web.Response:
        return json_response({"plugins": context.plugin_status() if context.plugin_status is not None else []})

    return plugins


def _status(context: ServerContext) -> Handler:
    async def status(request: web.Request) -> web.Response:
        live = context.requests.live()
        answer = {
            "state": context.state,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - _STARTED_S, 1),
            "models": [_model_row(model) for model in context.models()],
            "keys": _usage(context, "key", Counter((receipt.key or ANONYMOUS, receipt.model) for receipt in live)),
            "adapters": _usage(context, "adapter", Counter((adapter_of(receipt), receipt.model) for receipt in live)),
            "num_requests": len(live),
            "requests": [live_row(receipt) for receipt in live[:_MAX_ROWS]],
        }
        return json_response(answer)

    return status


def _usage(context: ServerContext, what: str, running: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    """What each key or adapter has used, and how many of its requests run now."""
    rows = {(row[what], row["model"]): row for row in context.metrics.usage(what)}
    for name, model in running:
        if name and (name, model) not in rows:
            rows[name, model] = {what: name, "model": model, **dict.fromkeys(Usage.FIELDS, 0)}
    return [row | {"running": running[pair]} for pair, row in rows.items()]


def _model_row(model: ModelService) -> dict[str, Any]:
    stats = asdict(model.engine.stats()) if model.state != "loading" else None
    progress = {"phase": model.progress.phase, "fraction": model.progress.fraction}
    adapters = [_adapter_row(info) for info in model.adapters.list()[:_MAX_ROWS]]
    info = getattr(model.engine, "info", None)  # not there before the model is loaded
    memory = info.facts.get("memory", []) if info is not None else []
    row = {"names": list(model.names), "state": model.state, "progress": progress, "stats": stats, "adapters": adapters}
    return row | {"memory": memory}


def _adapter_row(info: AdapterInfo) -> dict[str, Any]:
    """Where an adapter is and what it cost; its folder is not for everybody."""
    return {name: value for name, value in info._asdict().items() if name != "path"}


def _requests(context: ServerContext) -> Handler:
    async def requests(request: web.Request) -> web.Response:
        live, limit = context.requests.live(), _limit_of(request)
        rows = [live_row(receipt) for receipt in live[:limit]]
        return json_response({"num_requests": len(live), "requests": rows, "recent": context.requests.recent(limit)})

    return requests


def _limit_of(request: web.Request) -> int:
    text = request.query.get("limit", "100")
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= _MAX_ROWS):
        raise InvalidRequest(f"limit must be between 1 and {_MAX_ROWS}, got {text[:80]!r}", param="limit")
    return int(text)


def _request(context: ServerContext) -> Handler:
    async def one(request: web.Request) -> web.Response:
        request_id = request.match_info["request_id"]
        if found := context.requests.find(request_id):
            return json_response({"state": "running", **live_row(found[0])})
        if (ended := context.requests.ended(request_id)) is not None:
            return json_response({"state": "ended", **ended})
        raise _unknown(context, request_id)

    return one


def _unknown(context: ServerContext, request_id: str) -> RequestRefused:
    kept = f"the last {context.requests.max_ended} that ended are kept (log.recent_requests)"
    return RequestRefused(404, f"no request {request_id[:128]!r} is known: {kept}", param="request_id", code="not_found")


def _abort(context: ServerContext) -> Handler:
    async def abort(request: web.Request) -> web.Response:
        request_id = (await read_json_object(request)).get("request_id")
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequest("request_id must be the id of a running request", param="request_id")
        found = context.requests.find(request_id)
        if not found:
            raise _unknown(context, request_id)
        log.warning("request %s is aborted by an operator", request_id)
        return json_response({"request_id": request_id, "aborted": sum(_end(context, receipt) for receipt in found)})

    return abort


def _end(context: ServerContext, receipt: Receipt) -> int:
    """End every sequence of a request; its client is told. How many were running."""
    sequences = [sequence for stream in receipt.streams for sequence in stream.sequences if not sequence.is_finished]
    outputs = context.services[receipt.model].outputs
    for sequence in sequences:
        outputs.abort(sequence.request.request_id, "the request was aborted by an operator")
    return len(sequences)


def _drain(context: ServerContext) -> Handler:
    async def drain(request: web.Request) -> web.Response:
        """Begin to drain; {"now": true} does not wait for running requests, as a second SIGTERM does not."""
        now = (await read_json_object(request)).get("now", False) if request.can_read_body else False
        if not isinstance(now, bool):
            raise InvalidRequest(f"now must be true or false, got {str(now)[:80]!r}", param="now")
        if context.drain is None:
            raise RequestRefused(501, "this server is stopped by the program that started it", code="not_supported")
        why = f"POST /admin/drain by {receipt_of(request).key}"
        if context.state != "draining":
            context.drain(why)
        if now:
            context.drain(why)
        timeout_s = 0.0 if now else context.config.server.drain_timeout_s
        return json_response({"state": context.state, "timeout_s": timeout_s, "num_requests": len(context.requests.live())})

    return drain


def _reload(context: ServerContext) -> Handler:
    async def reload(request: web.Request) -> web.Response:
        is_dry = request.query.get("dry_run", "false")
        if is_dry not in ("true", "false"):
            raise InvalidRequest(f"dry_run must be 'true' or 'false', got {is_dry[:80]!r}", param="dry_run")
        if context.reload is None:
            raise RequestRefused(501, "this server has no configuration to reload", code="not_supported")
        report = await context.reload(is_dry == "true")
        return json_response(report, status=422 if report["refused"] and is_dry == "false" else 200)

    return reload


def _reset_prefix_cache(context: ServerContext) -> Handler:
    async def reset_prefix_cache(request: web.Request) -> web.Response:
        model = context.service(request.query.get("model"))
        model.engine.reset_prefix_cache()
        return json_response({"model": model.names[0], "reset": True})

    return reset_prefix_cache


def routes() -> list[RouteSpec]:
    """The server's own admin routes."""
    specs = [
        RouteSpec(
            name="admin.plugins", summary="what was loaded, and what was not and why", method="GET",
            path="/admin/plugins", build=_plugins, admin=True,
        ),
        RouteSpec(
            name="admin.status", summary="states and counters of every model", method="GET",
            path="/admin/status", build=_status, admin=True,
        ),
        RouteSpec(
            name="admin.requests", summary="requests that run, and the last ones that ended", method="GET",
            path="/admin/requests", build=_requests, admin=True,
        ),
        RouteSpec(
            name="admin.request", summary="one request: where it is, or its receipt", method="GET",
            path="/admin/requests/{request_id}", build=_request, admin=True,
        ),
        RouteSpec(
            name="admin.abort", summary="end a running request", method="POST",
            path="/admin/abort", build=_abort, admin=True,
        ),
        RouteSpec(
            name="admin.drain", summary="finish what runs, then end the process", method="POST",
            path="/admin/drain", build=_drain, admin=True,
        ),
        RouteSpec(
            name="admin.reload", summary="read the configuration again; dry_run=true: only tell", method="POST",
            path="/admin/reload", build=_reload, admin=True,
        ),
        RouteSpec(
            name="admin.reset_prefix_cache", summary="forget every cached prefix", method="POST",
            path="/admin/reset_prefix_cache", build=_reset_prefix_cache, admin=True,
        ),
    ]  # fmt: skip
    return [replace(spec, openapi=partial(operation, spec.name)) for spec in specs]
