"""A conversation as the input of a vector: texts of roles, which the model's chat template puts together."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import InvalidRequest, check_field_names, list_at, object_at, string_at, wrong_value

MAX_PARTS = 1024  # of one message
ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = ("role", "content", "name", "tool_call_id")
_MEDIA = {"image_url": "images", "input_audio": "audio", "audio_url": "audio", "video_url": "video", "file": "files"}

_TEXT = {"type": "string"}
_PART = {
    "type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT},
    "additionalProperties": False,
}  # fmt: skip
MESSAGES_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "additionalProperties": False,
                "properties": {
                    "role": {"enum": list(ROLES)},
                    "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}]},
                    "name": _TEXT,
                    "tool_call_id": _TEXT,
                },
            },
        },
        {"type": "null"},
    ]
}


def parse_messages(value: Any) -> list[dict[str, Any]] | None:
    """The messages, each checked. Raises InvalidRequest with the path of what is wrong."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise wrong_value("messages", "a list of at least one message", value)
    return [_message(f"messages[{index}]", message) for index, message in enumerate(value)]


def _message(path: str, value: Any) -> dict[str, Any]:
    message = object_at(path, value)
    check_field_names(path, message, _FIELDS)
    if message.get("role") not in ROLES:
        raise wrong_value(f"{path}.role", f"one of {', '.join(ROLES)}", message.get("role"))
    content = message.get("content")
    if not isinstance(content, str):
        for index, part in enumerate(list_at(f"{path}.content", content, MAX_PARTS)):
            _check_part(f"{path}.content[{index}]", part)
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            string_at(f"{path}.{name}", message[name])
    return message


def _check_part(path: str, value: Any) -> None:
    part = object_at(path, value)
    kind = part.get("type")
    if isinstance(kind, str) and kind in _MEDIA:
        message = f"{path}.type is {kind!r}, and this model takes text only, no {_MEDIA[kind]}"
        raise InvalidRequest(message, param=f"{path}.type", code="unsupported_content")
    if kind != "text":
        raise wrong_value(f"{path}.type", "'text'", kind)
    check_field_names(path, part, ("type", "text"))
    string_at(f"{path}.text", part.get("text"))
