"""Routes for operators: they ask for an admin key, and are refused where none is configured."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from aiohttp import web

from llmd.plugin.specs import RouteSpec
from llmd.server.errors import json_response

if TYPE_CHECKING:
    from llmd.server.app import ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _plugins(context: ServerContext) -> Handler:
    async def plugins(request: web.Request) -> web.Response:
        return json_response({"plugins": context.plugin_status() if context.plugin_status is not None else []})

    return plugins


def _status(context: ServerContext) -> Handler:
    async def status(request: web.Request) -> web.Response:
        models = [
            {
                "names": list(model.names),
                "state": model.state,
                "stats": asdict(model.engine.stats()) if model.state != "loading" else None,
            }
            for model in context.models()
        ]
        return json_response({"state": context.state, "models": models})

    return status


def _reset_prefix_cache(context: ServerContext) -> Handler:
    async def reset_prefix_cache(request: web.Request) -> web.Response:
        model = context.service(request.query.get("model"))
        model.engine.reset_prefix_cache()
        return json_response({"model": model.names[0], "reset": True})

    return reset_prefix_cache


def routes() -> list[RouteSpec]:
    """The server's own admin routes."""
    return [
        RouteSpec(
            name="admin.plugins", summary="what was loaded, and what was not and why", method="GET",
            path="/admin/plugins", build=_plugins, admin=True,
        ),
        RouteSpec(
            name="admin.status", summary="states and counters of every model", method="GET",
            path="/admin/status", build=_status, admin=True,
        ),
        RouteSpec(
            name="admin.reset_prefix_cache", summary="forget every cached prefix", method="POST",
            path="/admin/reset_prefix_cache", build=_reset_prefix_cache, admin=True,
        ),
    ]  # fmt: skip
