"""CORS: which pages' scripts may call this server from a browser."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import MiddlewareSpec, hookimpl

_MAX_AGE_S = 600
_EXPOSED = "X-Request-Id, Retry-After"


def _allow(allowed: tuple[str, ...], asked: str) -> str:
    """The value of an Allow header: what was asked for, where everything is allowed."""
    return asked or "*" if "*" in allowed else ", ".join(allowed)


def _build(config: Any) -> Any:
    server = config.server
    if not server.cors_allowed_origins:
        return None
    from aiohttp import web

    from llmd.api.v1 import receipt_of

    takes_any = "*" in server.cors_allowed_origins

    @web.middleware
    async def cors(request: web.Request, handler: Any) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is None:
            return await handler(request)
        headers = receipt_of(request).headers
        headers["Vary"] = "Origin"
        is_allowed = takes_any or origin in server.cors_allowed_origins
        if is_allowed:
            headers["Access-Control-Allow-Origin"] = "*" if takes_any else origin
            headers["Access-Control-Expose-Headers"] = _EXPOSED
        wanted = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or wanted is None:
            return await handler(request)
        if is_allowed:
            asked = request.headers.get("Access-Control-Request-Headers", "")
            headers["Access-Control-Allow-Methods"] = _allow(server.cors_allowed_methods, wanted)
            headers["Access-Control-Allow-Headers"] = _allow(server.cors_allowed_headers, asked)
            headers["Access-Control-Max-Age"] = str(_MAX_AGE_S)
        return web.Response(status=204 if is_allowed else 403)

    return cors


@hookimpl
def llmd_register_middlewares() -> list[MiddlewareSpec]:
    """Outside authentication: a preflight brings no key."""
    return [MiddlewareSpec(name="cors", summary="lets browsers call from allowed origins", build=_build, order=10)]
