"""Reading a JSON body: bounded, UTF-8, of the right content type, every mistake a 4xx."""

from __future__ import annotations

import gc
from typing import Any

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from llmd.errors import InvalidRequest
from llmd.server.errors import RequestRefused

MAX_NESTING = 254  # orjson's own bound when it writes
_LARGE_BYTES = 1 << 16


def _too_large(limit: int) -> RequestRefused:
    return RequestRefused(413, f"the body is larger than {limit} bytes (server.max_body_bytes)", code="request_too_large")


def _check_content_type(request: web.Request) -> None:
    """JSON, or nothing said; a form or plain text is refused, since it is nearly always a forgotten header."""
    if "Content-Type" not in request.headers:
        return
    kind = request.content_type
    if kind != "application/json" and not kind.endswith("+json"):
        shown = kind[:80]
        raise RequestRefused(415, f"Content-Type must be application/json, got {shown!r}", code="unsupported_media_type")


async def read_body(request: web.Request) -> bytes:
    """The body's bytes, at most `server.max_body_bytes`; refused by its Content-Length before a byte is read."""
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limit) from None
    except (web.RequestPayloadError, HttpProcessingError):
        raise InvalidRequest("the body does not arrive as its headers say (chunks, length or compression)") from None


async def read_json(request: web.Request) -> Any:
    """The parsed body. Raises InvalidRequest, or RequestRefused with 413 or 415."""
    _check_content_type(request)
    body = await read_body(request)
    try:
        value = _loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if body.count(b"[") + body.count(b"{") > MAX_NESTING:
        _check_nesting(value)
    return value


def _loads(body: bytes) -> Any:
    """Parse; of a large body none of the many new objects is garbage, and to look for some takes longer than to parse."""
    if len(body) < _LARGE_BYTES or not gc.isenabled():
        return orjson.loads(body)
    gc.disable()
    try:
        return orjson.loads(body)
    finally:
        gc.enable()


def _check_nesting(value: Any) -> None:
    """Whoever walks the value later (templates, validators) may recurse; orjson writes no deeper than MAX_NESTING."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        raise InvalidRequest(f"the body is nested deeper than {MAX_NESTING} levels", code="invalid_json") from None


async def read_json_object(request: web.Request) -> dict[str, Any]:
    """The parsed body, which must be an object."""
    body = await read_json(request)
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {type(body).__name__}", code="invalid_json")
    return body
