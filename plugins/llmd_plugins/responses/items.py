"""Input items, checked field by field, as the messages that chat templates take; output items go the same way back in."""

from __future__ import annotations

import secrets
from typing import Any

import orjson

from llmd.api.v1 import InvalidRequest, check_field_names, list_at, object_at, shown, string_at, wrong_value

MAX_ITEMS = 4096
MAX_PARTS = 1024  # of one item
MAX_TOOLS = 1024

ROLES = ("user", "assistant", "system", "developer")
_ITEMS = {
    "message": ("type", "role", "content", "id", "status", "phase"),
    "function_call": ("type", "call_id", "name", "arguments", "id", "status", "namespace", "caller", "async"),
    "function_call_output": ("type", "call_id", "output", "id", "status", "caller", "name", "namespace"),
    "reasoning": ("type", "id", "summary", "content", "encrypted_content", "status"),
    "item_reference": ("type", "id"),
}
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_MEDIA_PARTS = {"input_image": "images", "input_file": "files", "input_audio": "audio"}
_TOOL_FIELDS = (
    "type", "name", "description", "parameters", "strict", "allowed_callers", "defer_loading", "output_schema", "async",
)  # fmt: skip
# what is known of tools and not served, and the value that asks for nothing
_PLAIN_TOOLS: dict[str, Any] = {"allowed_callers": ["direct"], "defer_loading": False, "async": False}

_TEXT = {"type": "string"}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": _TEXT},
}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}
_STATUS = {"enum": ["in_progress", "completed", "incomplete"]}
_ITEM = {
    "anyOf": [
        {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"type": {"const": "message"}, "role": {"enum": list(ROLES)}, "content": _TEXTS},
            "additionalProperties": False,
        },
        {
            "type": "object",
            "required": ["type", "call_id", "name", "arguments"],
            "properties": {
                "type": {"const": "function_call"},
                "call_id": _TEXT,
                "name": _TEXT,
                "arguments": _TEXT,
                "status": _STATUS,
            },
            "additionalProperties": False,
        },
        {
            "type": "object",
            "required": ["type", "call_id", "output"],
            "properties": {"type": {"const": "function_call_output"}, "call_id": _TEXT, "output": _TEXTS},
            "additionalProperties": False,
        },
        {
            "type": "object",
            "required": ["type", "summary"],
            "properties": {
                "type": {"const": "reasoning"},
                "id": _TEXT,
                "summary": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "summary_text"}, "text": _TEXT},
                    },
                },
            },
        },
        {
            "type": "object",
            "required": ["type", "id"],
            "properties": {"type": {"const": "item_reference"}, "id": {"type": "string", "minLength": 1}},
            "additionalProperties": False,
        },
    ]
}
INPUT_SCHEMA: dict[str, Any] = {"anyOf": [_TEXT, {"type": "array", "items": _ITEM, "minItems": 1}]}
TOOLS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "name"],
                "additionalProperties": False,
                "properties": {
                    "type": {"const": "function"},
                    "name": _TEXT,
                    "description": {"type": ["string", "null"]},
                    "parameters": {"type": ["object", "null"]},
                    "strict": {"type": ["boolean", "null"]},
                },
            },
        },
        {"type": "null"},
    ]
}
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def new_id(prefix: str) -> str:
    """`msg_` and 48 hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(24)}"


def parse_input(value: Any) -> list[dict[str, Any]]:
    """The input as a list of checked items, each with a type and an id. Raises InvalidRequest."""
    if isinstance(value, str):
        value = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
    items = list_at("input", value, MAX_ITEMS)
    if not items:
        raise wrong_value("input", "a string or a list of at least one item", value)
    return [_item(f"input[{index}]", item) for index, item in enumerate(items)]


def _item(path: str, value: Any) -> dict[str, Any]:
    item = object_at(path, value)
    kind = item.get("type") or ("item_reference" if item.keys() <= {"type", "id"} else "message")
    if not isinstance(kind, str) or kind not in _ITEMS:
        message = f"{path}.type must be one of {', '.join(_ITEMS)}: no other item is served, got {str(kind)[:80]!r}"
        raise InvalidRequest(message, param=f"{path}.type", code="unsupported_content")
    check_field_names(path, item, _ITEMS[kind])
    _CHECKS[kind](path, item)
    if kind == "item_reference":
        return {"type": kind, "id": item["id"]}
    given_id = item.get("id")
    checked = {**item, "type": kind, "id": given_id if isinstance(given_id, str) else new_id(_PREFIXES[kind])}
    if kind == "message" and isinstance(item["content"], str):
        form = "output_text" if item["role"] == "assistant" else "input_text"
        checked["content"] = [{"type": form, "text": item["content"]}]
    return checked


def _check_message(path: str, item: dict[str, Any]) -> None:
    if item.get("role") not in ROLES:
        raise wrong_value(f"{path}.role", f"one of {', '.join(ROLES)}", item.get("role"))
    texts_of(f"{path}.content", item.get("content"))


def _check_call(path: str, item: dict[str, Any]) -> None:
    for name in ("call_id", "name", "arguments"):
        string_at(f"{path}.{name}", item.get(name))


def _check_output(path: str, item: dict[str, Any]) -> None:
    string_at(f"{path}.call_id", item.get("call_id"))
    texts_of(f"{path}.output", item.get("output"))


def _check_reasoning(path: str, item: dict[str, Any]) -> None:
    for name in ("summary", "content"):
        for index, part in enumerate(list_at(f"{path}.{name}", item.get(name) or [], MAX_PARTS)):
            string_at(f"{path}.{name}[{index}].text", object_at(f"{path}.{name}[{index}]", part).get("text"))


def _check_reference(path: str, item: dict[str, Any]) -> None:
    if not string_at(f"{path}.id", item.get("id")):
        raise wrong_value(f"{path}.id", "the id of an item", item["id"])


_CHECKS = {
    "item_reference": _check_reference,
    "message": _check_message,
    "function_call": _check_call,
    "function_call_output": _check_output,
    "reasoning": _check_reasoning,
}


def texts_of(path: str, value: Any) -> list[str]:
    """A text, or the texts of text parts. Raises InvalidRequest."""
    if isinstance(value, str):
        return [value]
    return [_part(f"{path}[{index}]", part) for index, part in enumerate(list_at(path, value, MAX_PARTS))]


def _part(path: str, value: Any) -> str:
    part = object_at(path, value)
    kind = part.get("type")
    if isinstance(kind, str) and kind in _MEDIA_PARTS:
        message = f"{path}.type is {kind!r}, and this model takes text only, no {_MEDIA_PARTS[kind]}"
        raise InvalidRequest(message, param=f"{path}.type", code="unsupported_content")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise wrong_value(f"{path}.type", f"one of {', '.join(_TEXT_PARTS)}", kind)
    name = _TEXT_PARTS[kind]
    return string_at(f"{path}.{name}", part.get(name))


# --- to messages


def messages_of(items: list[dict[str, Any]], instructions: str | None = None) -> list[dict[str, Any]]:
    """The messages of checked items: what the model thought, said and called in one turn is one message.

    Instructions, and system messages that follow them at once, are one: many templates take no more.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        texts = [instructions]
        while items and items[0]["type"] == "message" and items[0]["role"] in ("system", "developer"):
            texts += texts_of("input", items[0]["content"])
            items = items[1:]
        messages.append({"role": "system", "content": "\n\n".join(texts)})
    for item in items:
        kind = item["type"]
        if kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _joined(texts_of("input", item["content"]))})
        elif kind == "function_call_output":
            content = _joined(texts_of("input", item["output"]))
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        else:
            _add_to_turn(messages, item)
    return messages


def _add_to_turn(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    kind = item["type"]
    last = messages[-1] if messages else {}
    is_open = last.get("role") == "assistant" and not (kind == "reasoning" or (kind == "message" and last["content"]))
    if not is_open:
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        last["reasoning_content"] = "".join(part["text"] for part in parts)
    elif kind == "message":
        last["content"] = _joined(texts_of("input", item["content"]))
    else:
        function = {"name": item["name"], "arguments": _arguments(item["arguments"])}
        last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})


def _joined(texts: list[str]) -> str | list[dict[str, str]]:
    if len(texts) < 2:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _arguments(text: str) -> Any:
    """Templates want an object; what the model once wrote need not be one."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    return value if isinstance(value, dict) else text


# --- tools


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools, each a function; an empty list is none."""
    if value is None:
        return None
    tools = list_at("tools", value, MAX_TOOLS)
    return [_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)] or None


def _tool(path: str, value: Any) -> dict[str, Any]:
    tool = object_at(path, value)
    kind = tool.get("type")
    if kind != "function":
        message = f"{path}.type must be 'function': this server runs no tools of its own, got {str(kind)[:80]!r}"
        raise InvalidRequest(message, param=f"{path}.type", code="unsupported_parameter")
    check_field_names(path, tool, _TOOL_FIELDS)
    string_at(f"{path}.name", tool.get("name"))
    if tool.get("description") is not None:
        string_at(f"{path}.description", tool["description"])
    if tool.get("parameters") is not None:
        object_at(f"{path}.parameters", tool["parameters"])
    for name, plain in _PLAIN_TOOLS.items():
        if tool.get(name) is not None and tool[name] != plain:
            message = f"{path}.{name} is not served by this server, got {shown(tool[name])}"
            raise InvalidRequest(message, param=f"{path}.{name}", code="unsupported_parameter")
    if tool.get("strict") not in (None, True, False):
        raise wrong_value(f"{path}.strict", "a boolean", tool["strict"])
    return tool


def chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in the shape of chat completions, which templates know."""
    function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": function}


def parse_tool_choice(value: Any) -> Any:
    """none, auto, required, the object that names a function, or the one that names those allowed; as it came."""
    if value is None or (isinstance(value, str) and value in ("none", "auto", "required")):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "allowed_tools":
        return _allowed_tools(value)
    if kind != "function" or not isinstance(value.get("name"), str):
        allowed = "'none', 'auto', 'required', {'type': 'function', 'name': …} or {'type': 'allowed_tools', …}"
        raise wrong_value("tool_choice", allowed, value)
    return {"type": "function", "name": value["name"]}


def _allowed_tools(value: dict[str, Any]) -> dict[str, Any]:
    check_field_names("tool_choice", value, ("type", "mode", "tools"))
    if value.get("mode") not in ("auto", "required"):
        raise wrong_value("tool_choice.mode", "'auto' or 'required'", value.get("mode"))
    tools = list_at("tool_choice.tools", value.get("tools"), MAX_TOOLS)
    for index, tool in enumerate(tools):
        path = f"tool_choice.tools[{index}]"
        if object_at(path, tool).get("type") != "function":
            raise wrong_value(f"{path}.type", "'function'", tool.get("type"))
        string_at(f"{path}.name", tool.get("name"))
    return value


def names_of(choice: dict[str, Any]) -> list[str]:
    """The functions that a tool_choice names."""
    return [tool["name"] for tool in choice["tools"]] if choice["type"] == "allowed_tools" else [choice["name"]]
