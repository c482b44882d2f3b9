"""A conversation as clients write it, checked field by field, as the chat template wants it."""

from __future__ import annotations

from typing import Any

import orjson

from llmd.api.v1 import InvalidRequest
from llmd_plugins.openai.fields import shown

MAX_PARTS = 1024  # of one message
ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA_PARTS = {
    "image_url": "images", "input_image": "images", "image": "images", "image_pil": "images", "image_embeds": "images",
    "input_audio": "audio", "audio_url": "audio", "video_url": "video", "file": "files", "input_file": "files",
}  # fmt: skip
# What clients send back of an answer and what no template reads.
_IGNORED = (
    "refusal", "annotations", "audio", "function_call", "reasoning_details", "parsed", "provider_specific_fields", "id",
    "type", "status", "cache_control",
)  # fmt: skip
_STRINGS = ("name", "tool_call_id", "reasoning", "reasoning_content", "thinking")
_KEPT = ("role", "content", "tool_calls", *_STRINGS)

_TEXT = {"type": "string"}
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "additionalProperties": False,
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {
                "anyOf": [
                    _TEXT,
                    {"type": "null"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "additionalProperties": False,
                            "properties": {"type": {"const": "text"}, "text": _TEXT},
                        },
                    },
                ]
            },
            "name": _TEXT,
            "tool_call_id": _TEXT,
            "tool_calls": {"type": "array", "items": {"type": "object"}},
        },
    },
}
TOOLS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "function"],
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": _TEXT, "description": _TEXT, "parameters": {"type": "object"}},
            },
        },
    },
}


def _wrong(path: str, allowed: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{path} must be {allowed}, got {shown(value)}", param=path, code="invalid_value")


def _string(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(path, "a string", value)
    return value


def _object(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, "an object", value)
    return value


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """The messages, content as text or text parts. Raises InvalidRequest with a path like `messages[2].content[0].type`."""
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "a list of at least one message", value)
    return [_message(f"messages[{index}]", message) for index, message in enumerate(value)]


def _message(path: str, value: Any) -> dict[str, Any]:
    given = _object(path, value)
    role = given.get("role")
    if role not in ROLES:
        raise _wrong(f"{path}.role", f"one of {', '.join(ROLES)}", role)
    for name, entry in given.items():
        if name not in _KEPT and name not in _IGNORED and entry is not None:
            brief = name[:64]
            raise InvalidRequest(f"unknown field {brief!r} in {path}", param=f"{path}.{brief}", code="unknown_parameter")
    message: dict[str, Any] = {"role": role, "content": _content(path, given)}
    for name in _STRINGS:
        if given.get(name) is not None:
            message[name] = _string(f"{path}.{name}", given[name])
    if given.get("tool_calls"):
        message["tool_calls"] = _tool_calls(f"{path}.tool_calls", given["tool_calls"])
    return message


def _content(path: str, given: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """Text, or a list of text parts, which the template joins where it does not take parts."""
    value = given.get("content")
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if len(value) > MAX_PARTS:
            raise _wrong(f"{path}.content", f"a list of at most {MAX_PARTS} parts", value)
        texts = [_part(f"{path}.content[{index}]", part) for index, part in enumerate(value)]
        return [{"type": "text", "text": text} for text in texts]
    if value is not None:
        raise _wrong(f"{path}.content", "a string or a list of text parts", value)
    if given["role"] != "assistant" and "content" not in given:
        raise InvalidRequest(f"{path}.content is required", param=f"{path}.content", code="missing_required_parameter")
    return None if given.get("tool_calls") else ""


def _part(path: str, value: Any) -> str:
    """The text of one part; this model takes nothing else."""
    if isinstance(value, str):
        return value
    part = _object(path, value)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in {**_TEXT_PARTS, **_MEDIA_PARTS}:
        raise _wrong(f"{path}.type", "'text'", kind)
    if kind in _MEDIA_PARTS:
        message = f"{path}.type is {kind!r}, and this model takes text only, no {_MEDIA_PARTS[kind]}"
        raise InvalidRequest(message, param=f"{path}.type", code="unsupported_content")
    name = _TEXT_PARTS[kind]
    return _string(f"{path}.{name}", part.get(name))


def _tool_calls(path: str, value: Any) -> list[dict[str, Any]]:
    """Earlier calls; templates want the arguments as an object where they are one."""
    if not isinstance(value, list):
        raise _wrong(path, "a list of tool calls", value)
    calls = []
    for index, entry in enumerate(value):
        call = _object(f"{path}[{index}]", entry)
        function = _object(f"{path}[{index}].function", call.get("function"))
        name = _string(f"{path}[{index}].function.name", function.get("name"))
        arguments = _arguments(f"{path}[{index}].function.arguments", function.get("arguments"))
        calls.append({"id": call.get("id"), "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _arguments(path: str, value: Any) -> Any:
    if value is None or isinstance(value, dict):
        return value or {}
    text = _string(path, value)
    try:
        parsed = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text  # what the model once wrote need not be JSON
    return parsed if isinstance(parsed, dict) else text


def check_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools as they were given; an empty list is none."""
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise _wrong("tools", "a list of tools", value)
    for index, entry in enumerate(value):
        tool = _object(f"tools[{index}]", entry)
        if tool.get("type") != "function":
            raise _wrong(f"tools[{index}].type", "'function'", tool.get("type"))
        function = _object(f"tools[{index}].function", tool.get("function"))
        _string(f"tools[{index}].function.name", function.get("name"))
        if function.get("parameters") is not None:
            _object(f"tools[{index}].function.parameters", function["parameters"])
    return value
