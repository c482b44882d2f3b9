"""The admin routes' operations in /openapi.json, by the names of their specs."""

from __future__ import annotations

from typing import Any

from llmd.server.openapi import error_responses

_TEXT, _WHOLE = {"type": "string"}, {"type": "integer", "minimum": 0}
_ROWS = {"type": "array", "items": {"type": "object"}}
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_MODEL = {"type": "object", "required": ["names", "state"], "properties": {"names": {"type": "array", "items": _TEXT}}}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _body(required: bool, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties) if required else []}
    return {"required": required, "content": {"application/json": {"schema": schema}}}


def _in_query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema}


_REQUEST_ID = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}

# spec → summary, the answer, statuses of errors besides 401, and what the operation has more
_OPERATIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "admin.plugins": ("What was loaded, and what was not and why", _object(plugins=_ROWS), (), {}),
    "admin.status": (
        "States and counters of every model",
        _object(state=_TEXT, version=_TEXT, models={"type": "array", "items": _MODEL}, num_requests=_WHOLE, requests=_ROWS),
        (),
        {},
    ),
    "admin.requests": (
        "Requests that run, and the last ones that ended",
        _object(num_requests=_WHOLE, requests=_ROWS, recent=_ROWS),
        ("400",),
        {"parameters": [_in_query("limit", {"type": "integer", "minimum": 1, "maximum": 1000})]},
    ),
    "admin.request": (
        "One request: where it is, or its receipt",
        _object(state={"enum": ["running", "ended"]}),
        ("404",),
        {"parameters": [_REQUEST_ID]},
    ),
    "admin.abort": (
        "End a running request",
        _object(request_id=_TEXT, aborted=_WHOLE),
        ("400", "404", "413", "415"),
        {"requestBody": _body(True, request_id=_TEXT)},
    ),
    "admin.drain": (
        "Finish what runs, then end the process",
        _object(state=_TEXT, timeout_s={"type": "number"}, num_requests=_WHOLE),
        ("400", "413", "415", "501"),
        {"requestBody": _body(False, now={"type": "boolean"})},
    ),
    "admin.reload": (
        "Read the configuration again",
        {"type": "object"},
        ("400", "422", "501"),
        {"parameters": [_in_query("dry_run", {"enum": ["true", "false"]})]},
    ),
    "admin.reset_prefix_cache": (
        "Forget every cached prefix",
        _object(model=_TEXT, reset={"const": True}),
        ("404", "503"),
        {"parameters": [_in_query("model", _TEXT)]},
    ),
}  # fmt: skip
_MORE = {
    "422": {"description": "some keys cannot be changed while the server runs: the report says which"},
    "501": {"description": "not with this server", "content": _ERROR},
}


def operation(name: str) -> dict[str, Any]:
    """The operation of one admin route."""
    summary, answer, statuses, more = _OPERATIONS[name]
    known = error_responses("401", *(status for status in statuses if status not in _MORE))
    others = {status: _MORE[status] for status in statuses if status in _MORE}
    done = {"description": "done", "content": {"application/json": {"schema": answer}}}
    return {"summary": summary, "tags": ["admin"], "responses": {"200": done, **known, **others}, **more}
