"""The operations of /openapi.json, from the models that validate the requests."""

from __future__ import annotations

from typing import Any

from pydantic import RootModel

from llmd.api.v1 import error_responses, json_operation
from llmd_plugins.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeChat, TokenizePrompt

_TAG = "openai"
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": {"type": "integer"}}},
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "root": {"type": "string"},
        "parent": {"type": ["string", "null"]},
        "max_model_len": {"type": ["integer", "null"]},
    },
}


class TokenizeRequest(RootModel[TokenizePrompt | TokenizeChat]):
    """POST /tokenize: a text or a conversation."""


def _answer(kind: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": {"type": "object", "required": ["index", "finish_reason"]}},
            "usage": _USAGE,
        },
    }


def models() -> dict[str, Any]:
    """GET /v1/models."""
    listed = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
    }
    return _get("List the served models", listed)


def model() -> dict[str, Any]:
    """GET /v1/models/{model}."""
    operation = _get("Show one served model", _MODEL)
    operation["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    operation["responses"].update(error_responses("404"))
    return operation


def _get(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    responses = {"200": {"description": "done", "content": content}, **error_responses("401")}
    return {"summary": summary, "tags": [_TAG], "responses": responses}


def tokenizer_info() -> dict[str, Any]:
    """GET /tokenizer_info."""
    text = {"type": ["string", "null"]}
    properties = {"bos_token": text, "eos_token": text, "chat_template": text}
    operation = _get("What the tokenizer's files say", {"type": "object", "properties": properties})
    operation["parameters"] = [{"name": "model", "in": "query", "schema": {"type": "string"}}]
    operation["responses"].update(error_responses("404"))
    return operation


def completions() -> dict[str, Any]:
    """POST /v1/completions."""
    return json_operation("Continue a prompt", CompletionRequest, _answer("text_completion"), tag=_TAG, streams=True)


def chat() -> dict[str, Any]:
    """POST /v1/chat/completions."""
    return json_operation("Answer a conversation", ChatRequest, _answer("chat.completion"), tag=_TAG, streams=True)


def tokenize() -> dict[str, Any]:
    """POST /tokenize."""
    schema = {
        "type": "object",
        "required": ["count", "max_model_len", "tokens"],
        "properties": {
            "count": {"type": "integer"},
            "max_model_len": {"type": "integer"},
            "tokens": {"type": "array", "items": {"type": "integer"}},
            "token_strs": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
        },
    }
    return json_operation("Text or a conversation to token ids", TokenizeRequest, schema, tag=_TAG)


def detokenize() -> dict[str, Any]:
    """POST /detokenize."""
    schema = {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}}
    return json_operation("Token ids to text", DetokenizeRequest, schema, tag=_TAG)
