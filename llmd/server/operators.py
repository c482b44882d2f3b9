"""The apps of the other two listeners: operators' routes on their own UNIX socket, and the metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.listeners import peer_user
from llmd.server.auth import Principal
from llmd.server.middleware import add_response_headers, make_outermost_middleware, receipt_of

if TYPE_CHECKING:
    from llmd.plugin.specs import RouteSpec
    from llmd.server.app import ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ALSO = ("/health", "/ready", "/version", "/metrics")  # what an operator looks at first, beside the admin routes


@web.middleware
async def _trust_peer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who could open the socket's file is an operator; the kernel says which user it is."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has left")
    user = peer_user(transport.get_extra_info("socket"))
    receipt = receipt_of(request)
    receipt.principal, receipt.key = Principal(key=user, is_admin=True), user
    return await handler(request)


def _make_app(context: ServerContext, specs: Iterable[RouteSpec], middlewares: Iterable[Any]) -> web.Application:
    from llmd.server.app import CONTEXT

    app = web.Application(middlewares=middlewares, client_max_size=context.config.server.max_body_bytes)
    app[CONTEXT] = context
    for spec in specs:
        handler = spec.build(context)
        for method in ("GET", "HEAD") if spec.method == "GET" else (spec.method,):
            app.router.add_route(method, spec.path, handler)
    app.on_response_prepare.append(add_response_headers)
    return app


def create_admin_app(context: ServerContext) -> web.Application:
    """Admin routes, plugins' ones too, and the daemon's health, for a UNIX socket whose permission is the key.

    After `create_app`, which collects the routes.
    """
    specs = [spec for spec in context.routes if spec.admin or spec.path in _ALSO]
    return _make_app(context, specs, [make_outermost_middleware(context), _trust_peer])


def create_metrics_app(context: ServerContext) -> web.Application:
    """/metrics and nothing else, without a key."""
    specs = [spec for spec in context.routes if spec.path == "/metrics"]
    return _make_app(context, specs, [make_outermost_middleware(context)])
