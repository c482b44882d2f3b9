"""The operations of /openapi.json, from the model that validates the request."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import error_responses, json_operation
from llmd_plugins.responses.protocol import CountRequest, ResponseRequest

_TAG = "responses"
_RESPONSE = {
    "type": "object",
    "required": ["id", "object", "created_at", "status", "model", "output", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "response"},
        "created_at": {"type": "integer"},
        "status": {"enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]},
        "model": {"type": "string"},
        "output": {"type": "array", "items": {"type": "object", "required": ["id", "type"]}},
        "usage": {"type": ["object", "null"]},
    },
}
_DELETED = {
    "type": "object",
    "required": ["id", "object", "deleted"],
    "properties": {"id": {"type": "string"}, "object": {"const": "response"}, "deleted": {"const": True}},
}
_ITEMS = {
    "type": "object",
    "required": ["object", "data", "has_more"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"type": "object", "required": ["id", "type"]}},
        "first_id": {"type": ["string", "null"]},
        "last_id": {"type": ["string", "null"]},
        "has_more": {"type": "boolean"},
    },
}


_COUNT = {
    "type": "object",
    "required": ["object", "input_tokens"],
    "properties": {"object": {"const": "response.input_tokens"}, "input_tokens": {"type": "integer"}},
}


def count_tokens() -> dict[str, Any]:
    """POST /v1/responses/input_tokens."""
    return json_operation("Count a conversation's tokens", CountRequest, _COUNT, tag=_TAG)


def create() -> dict[str, Any]:
    """POST /v1/responses."""
    return json_operation("Answer with items", ResponseRequest, _RESPONSE, tag=_TAG, streams=True)


def retrieve() -> dict[str, Any]:
    """GET /v1/responses/{response_id}."""
    operation = _stored("Show a stored response, or the events of one that was streamed in the background", _RESPONSE)
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    operation["parameters"] += [
        {"name": "stream", "in": "query", "schema": {"type": "boolean"}},
        {"name": "starting_after", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}},
    ]
    return operation


def delete() -> dict[str, Any]:
    """DELETE /v1/responses/{response_id}."""
    return _stored("Forget a stored response", _DELETED)


def cancel() -> dict[str, Any]:
    """POST /v1/responses/{response_id}/cancel."""
    return _stored("Stop a response in the background", _RESPONSE)


def input_items() -> dict[str, Any]:
    """GET /v1/responses/{response_id}/input_items."""
    operation = _stored("List the input of a stored response", _ITEMS)
    operation["parameters"] += [
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 100}},
        {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}},
    ]
    return operation


def _stored(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {
        "summary": summary,
        "tags": [_TAG],
        "parameters": [
            {"name": "response_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ],
        "responses": {"200": {"description": "done", "content": content}, **error_responses("400", "401", "404")},
    }
