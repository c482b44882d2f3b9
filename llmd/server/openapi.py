"""/openapi.json, made of the routes' own operation objects and of the models that validate their requests."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from llmd._version import __version__
from llmd.plugin.specs import RouteSpec

if TYPE_CHECKING:
    from pydantic import BaseModel

    from llmd.server.app import ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MEANINGS = {
    "400": "the request is wrong: `param` names the field",
    "401": "no API key, or one that is not known",
    "404": "no such path or model",
    "413": "the body is too large",
    "415": "the body is not JSON",
    "429": "too many requests wait: see Retry-After",
    "503": "loading or shutting down",
}


def json_operation(
    summary: str, request: type[BaseModel], response: Mapping[str, Any], *, tag: str, streams: bool = False
) -> dict[str, Any]:
    """The operation of a route that takes a JSON body and answers in JSON or, where it streams, in events."""
    schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
    content: dict[str, Any] = {"application/json": {"schema": dict(response)}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": summary,
        "tags": [tag],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "done", "content": content}, **error_responses()},
    }


def error_responses(*statuses: str) -> dict[str, Any]:
    """The error answers of an operation; all of them where none is named."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses or _MEANINGS}


def build_document(routes: list[RouteSpec], root_path: str = "") -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {"Error": _ERROR}
    for spec in routes:
        if spec.openapi is None:
            continue
        operation = {"operationId": spec.name, **spec.openapi()}
        _hoist(operation, schemas)
        path = re.sub(r"\{(\w+):[^{}]*\}", r"{\1}", spec.path)
        paths.setdefault(path, {})[spec.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmd", "version": __version__},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _hoist(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Move a request schema and its definitions to the components, where the references point."""
    for media in operation.get("requestBody", {}).get("content", {}).values():
        schema = dict(media["schema"])
        schemas.update(schema.pop("$defs", {}))
        if "title" in schema:
            schemas[schema["title"]] = schema
            media["schema"] = {"$ref": f"#/components/schemas/{schema['title']}"}


def _openapi(context: ServerContext) -> Handler:
    document: list[bytes] = []

    async def openapi(request: web.Request) -> web.Response:
        if not document:
            document.append(orjson.dumps(build_document(list(context.routes), context.config.server.root_path)))
        return web.Response(body=document[0], content_type="application/json")

    return openapi


def routes() -> list[RouteSpec]:
    """The document's own route."""
    spec = RouteSpec(
        name="server.openapi", summary="this API in OpenAPI 3.1", method="GET", path="/openapi.json", build=_openapi,
        openapi=lambda: {"summary": "This document", "tags": ["server"], "responses": {"200": {"description": "it"}}},
    )  # fmt: skip
    return [spec]
