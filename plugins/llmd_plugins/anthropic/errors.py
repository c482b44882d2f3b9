"""Errors in Anthropic's shape on its routes, whoever raised them: the handler, the key check, the router."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from llmd.api.v1 import receipt_of, wire_error

if TYPE_CHECKING:
    from llmd.api.v1 import Config

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PREFIX = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(status: int, message: str, request_id: str) -> bytes:
    """The JSON object of an error, answered or sent as an event."""
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})


def error_shape(config: Config) -> Any:
    """The middleware; other routes pass it untouched."""
    prefix = config.server.root_path.rstrip("/") + PREFIX

    @web.middleware
    async def shape(request: web.Request, handler: Handler) -> web.StreamResponse:
        path = request.path
        if not path.startswith((PREFIX, prefix)) or not _is_ours(path.removeprefix(prefix).removeprefix(PREFIX)):
            return await handler(request)
        receipt = receipt_of(request)
        receipt.headers["request-id"] = receipt.request_id
        try:
            return await handler(request)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001  the border: the outermost layer would answer in another shape
            answer = wire_error(error)
            receipt.failed(answer, error)
            body = error_body(answer.status, answer.message, receipt.request_id)
            return web.Response(status=answer.status, body=body, content_type="application/json", headers=answer.headers)

    return shape


def _is_ours(rest: str) -> bool:
    return not rest or rest.startswith("/")
