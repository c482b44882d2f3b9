"""How errors look on the wire: OpenAI's shape, one table from exception to status, never a path or a traceback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from aiohttp import web

from llmd.engine.step import FinishReason
from llmd.errors import InvalidRequest, LlmdError, ModelNotFound, NotReady, Overloaded
from llmd.server.deadlines import timeout_message

if TYPE_CHECKING:
    from llmd.server.app import ServerContext

_HTTP_TYPES = {
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    417: ("invalid_request_error", "expectation_failed"),
}
_KEPT_HEADERS = ("Allow", "WWW-Authenticate", "Retry-After")


class RequestRefused(LlmdError):
    """An answer other than 400: its status, type and code are given."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002  the wire's own name
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.code, self.param = status, type, code, param
        self.headers = dict(headers or {})


class WireError(NamedTuple):
    """An error as the client will see it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = {}

    def body(self) -> bytes:
        """The JSON object of the answer, and of an error event in a stream."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": fields}, default=repr)


def refusal_of_end(context: ServerContext, reason: str | None, error: str | None) -> LlmdError | None:
    """What a sequence's end is to its client where it is not one that an answer can tell.

    A passed deadline is an error too, 504, streamed or not: a text that was cut off must not look like a whole one.
    """
    if reason == FinishReason.ERROR and any(model.engine.failure is not None for model in context.models()):
        return RequestRefused(503, "the engine failed, the server starts anew", type="server_error", code="engine_failed")
    if reason == FinishReason.ERROR:
        message = f"the generation failed: {error or 'unknown reason'}"
        return RequestRefused(500, message, type="server_error", code="generation_failed")
    if reason == FinishReason.REFUSED:
        return RequestRefused(400, error or "refused", code="adapter_not_loaded", param="model")
    if reason == FinishReason.TIMEOUT:
        return RequestRefused(504, timeout_message(context.config), type="timeout_error", code="timeout")
    if reason == FinishReason.ABORT and error is not None:
        return RequestRefused(503, error, type="server_error", code="aborted")
    if reason == FinishReason.ABORT and context.state != "ready":
        return NotReady(f"the server is {context.state}")
    return None


def _printable(text: str) -> str:
    """A message that any JSON encoder takes: lone surrogates in a client's words become '?'."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _retry_after(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}


def _from_http_exception(error: web.HTTPException) -> WireError:
    """404, 405 and what else aiohttp itself raises."""
    kind, code = _HTTP_TYPES.get(error.status, ("invalid_request_error" if error.status < 500 else "server_error", None))
    kept = {name: error.headers[name] for name in _KEPT_HEADERS if name in error.headers}
    messages = {404: "there is no such path", 405: f"this path takes {kept.get('Allow', 'other methods')}"}
    return WireError(error.status, messages.get(error.status, error.reason), kind, None, code, kept)


def wire_error(error: BaseException) -> WireError:
    """The answer to an exception; what is not ours becomes a 500 that says nothing."""
    match error:
        case RequestRefused():
            found = WireError(error.status, str(error), error.type, error.param, error.code, error.headers)
        case ModelNotFound():
            found = WireError(404, error.message, "invalid_request_error", error.param, error.code or "model_not_found")
        case InvalidRequest():
            found = WireError(400, error.message, "invalid_request_error", error.param, error.code)
        case Overloaded():
            headers = _retry_after(error.retry_after_s)
            found = WireError(429, str(error), "rate_limit_error", None, "rate_limit_exceeded", headers)
        case NotReady():
            headers = _retry_after(error.retry_after_s)
            found = WireError(503, str(error), "server_error", None, "service_unavailable", headers)
        case web.HTTPException():
            found = _from_http_exception(error)
        case _:
            found = WireError(500, "internal server error", "server_error", None, "internal_error")
    return found._replace(message=_printable(found.message))


def error_response(error: WireError) -> web.Response:
    """The whole answer to a request that failed before anything was sent."""
    return web.Response(status=error.status, body=error.body(), content_type="application/json", headers=error.headers)


def json_response(payload: Any, status: int = 200) -> web.Response:
    """Any answer in JSON."""
    body = orjson.dumps(payload, option=orjson.OPT_NON_STR_KEYS)
    return web.Response(status=status, body=body, content_type="application/json")
