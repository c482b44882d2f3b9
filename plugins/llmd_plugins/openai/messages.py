"""A conversation as clients write it, checked field by field, as the chat template wants it."""

from __future__ import annotations

from typing import Any

import orjson

from llmd.api.v1 import InvalidRequest, shown

MAX_PARTS = 1024  # of one message
MAX_TOOL_CALLS = 1024  # of one message
ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA_PARTS = {
    "image_url": "images", "input_image": "images", "image": "images", "image_pil": "images", "image_embeds": "images",
    "input_audio": "audio", "audio_url": "audio", "video_url": "video", "file": "files", "input_file": "files",
}  # fmt: skip
# What clients send back of an answer and what no template reads.
_IGNORED = (
    "refusal", "annotations", "audio", "reasoning_details", "parsed", "provider_specific_fields", "id",
    "type", "status", "cache_control",
)  # fmt: skip
_STRINGS = ("name", "tool_call_id", "reasoning", "reasoning_content", "thinking")
_KEPT = ("role", "content", "tool_calls", "function_call", *_STRINGS)

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


def wrong(path: str, allowed: str, value: Any) -> InvalidRequest:
    """What is said of a value that is not among those allowed."""
    return InvalidRequest(f"{path} must be {allowed}, got {shown(value)}", param=path, code="invalid_value")


def string_at(path: str, value: Any) -> str:
    """The value, which must be a string."""
    if not isinstance(value, str):
        raise wrong(path, "a string", value)
    return value


def object_at(path: str, value: Any) -> dict[str, Any]:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        raise wrong(path, "an object", value)
    return value


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """The messages, content as text or text parts. Raises InvalidRequest with a path like `messages[2].content[0].type`."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", "a list of at least one message", value)
    return [_message(f"messages[{index}]", message) for index, message in enumerate(value)]


def _message(path: str, value: Any) -> dict[str, Any]:
    given = object_at(path, value)
    role = given.get("role")
    if role == "function":  # the older name
        role = "tool"
        given = {**given, "role": role}
    if role not in ROLES:
        raise wrong(f"{path}.role", f"one of {', '.join(ROLES)}", role)
    for name, entry in given.items():
        if name not in _KEPT and name not in _IGNORED and entry is not None:
            brief = name[:64]
            raise InvalidRequest(f"unknown field {brief!r} in {path}", param=f"{path}.{brief}", code="unknown_parameter")
    message: dict[str, Any] = {"role": role, "content": _content(path, given)}
    for name in _STRINGS:
        if given.get(name) is not None:
            message[name] = string_at(f"{path}.{name}", given[name])
    if given.get("tool_calls"):
        message["tool_calls"] = _tool_calls(f"{path}.tool_calls", given["tool_calls"])
    elif given.get("function_call") is not None:
        message["tool_calls"] = [_tool_call(None, f"{path}.function_call", given["function_call"])]
    return message


def _content(path: str, given: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """Text, or a list of text parts, which the template joins where it does not take parts."""
    value = given.get("content")
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if len(value) > MAX_PARTS:
            raise wrong(f"{path}.content", f"a list of at most {MAX_PARTS} parts", value)
        texts = [_part(f"{path}.content[{index}]", part) for index, part in enumerate(value)]
        return [{"type": "text", "text": text} for text in texts]
    if value is not None:
        raise wrong(f"{path}.content", "a string or a list of text parts", value)
    if given["role"] != "assistant" and "content" not in given:
        raise InvalidRequest(f"{path}.content is required", param=f"{path}.content", code="missing_required_parameter")
    return None if given.get("tool_calls") or given.get("function_call") else ""


def _part(path: str, value: Any) -> str:
    """The text of one part; this model takes nothing else."""
    if isinstance(value, str):
        return value
    part = object_at(path, value)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in {**_TEXT_PARTS, **_MEDIA_PARTS}:
        raise wrong(f"{path}.type", "'text'", kind)
    if kind in _MEDIA_PARTS:
        message = f"{path}.type is {kind!r}, and this model takes text only, no {_MEDIA_PARTS[kind]}"
        raise InvalidRequest(message, param=f"{path}.type", code="unsupported_content")
    name = _TEXT_PARTS[kind]
    return string_at(f"{path}.{name}", part.get(name))


def _tool_calls(path: str, value: Any) -> list[dict[str, Any]]:
    """Earlier calls; templates want the arguments as an object where they are one."""
    if not isinstance(value, list) or len(value) > MAX_TOOL_CALLS:
        raise wrong(path, f"a list of at most {MAX_TOOL_CALLS} tool calls", value)
    calls = []
    for index, entry in enumerate(value):
        call = object_at(f"{path}[{index}]", entry)
        calls.append(_tool_call(call.get("id"), f"{path}[{index}].function", call.get("function")))
    return calls


def _tool_call(call_id: Any, path: str, value: Any) -> dict[str, Any]:
    function = object_at(path, value)
    name = string_at(f"{path}.name", function.get("name"))
    arguments = _arguments(f"{path}.arguments", function.get("arguments"))
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(path: str, value: Any) -> Any:
    if value is None or isinstance(value, dict):
        return value or {}
    text = string_at(path, value)
    try:
        parsed = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text  # what the model once wrote need not be JSON
    return parsed if isinstance(parsed, dict) else text
