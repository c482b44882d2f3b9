"""The operations of /openapi.json, from the models that validate the requests."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import json_operation
from llmd_plugins.anthropic.protocol import CountTokensRequest, MessagesRequest

_TAG = "anthropic"
_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["id", "type", "role", "content", "model", "stop_reason", "stop_sequence", "usage"],
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "content": {"type": "array", "items": {"type": "object", "required": ["type"]}},
        "model": {"type": "string"},
        "stop_reason": {
            "enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
        },
        "stop_sequence": {"type": ["string", "null"]},
        "usage": {
            "type": "object",
            "required": ["input_tokens", "output_tokens"],
            "properties": {
                "input_tokens": {"type": "integer"},
                "output_tokens": {"type": "integer"},
                "cache_read_input_tokens": {"type": "integer"},
            },
        },
    },
}  # fmt: skip
_COUNT = {"type": "object", "required": ["input_tokens"], "properties": {"input_tokens": {"type": "integer"}}}


def messages() -> dict[str, Any]:
    """POST /v1/messages."""
    operation = json_operation("Answer a conversation (Anthropic)", MessagesRequest, _MESSAGE, tag=_TAG, streams=True)
    return _with_errors(operation)


def count_tokens() -> dict[str, Any]:
    """POST /v1/messages/count_tokens."""
    return _with_errors(json_operation("Count a conversation's tokens (Anthropic)", CountTokensRequest, _COUNT, tag=_TAG))


def _with_errors(operation: dict[str, Any]) -> dict[str, Any]:
    """The error answers have Anthropic's shape."""
    for status, answer in operation["responses"].items():
        if status != "200":
            answer["content"] = {"application/json": {"schema": _ERROR}}
    return operation
