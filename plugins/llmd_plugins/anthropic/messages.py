"""A conversation in Anthropic's blocks, checked field by field, as the messages that chat templates take."""

from __future__ import annotations

from typing import Any, NamedTuple

from llmd.api.v1 import InvalidRequest, check_field_names, list_at, object_at, shown, string_at, wrong_value

MAX_BLOCKS = 4096  # of one message
MAX_MESSAGES = 100_000
MAX_TOOLS = 1024

ROLES = ("user", "assistant", "system")
_BLOCKS = {
    "text": ("type", "text", "cache_control", "citations"),
    "tool_use": ("type", "id", "name", "input", "cache_control", "caller", "toolset_name"),
    "tool_result": ("type", "tool_use_id", "content", "is_error", "cache_control", "toolset_name"),
    "thinking": ("type", "thinking", "signature"),
    "redacted_thinking": ("type", "data"),
}
_STRINGS_OF = {
    "text": ("text",),
    "tool_use": ("id", "name"),
    "tool_result": ("tool_use_id",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
}
_BLOCKS_OF = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}
_NOT_TEXT = {"image": "images", "document": "documents", "search_result": "search results", "container_upload": "files"}
_TOOL_FIELDS = (
    "type", "name", "description", "input_schema", "cache_control", "strict", "input_examples", "eager_input_streaming",
    "allowed_callers", "defer_loading",
)  # fmt: skip

# what is known of tools and not served, and the value that asks for nothing
_PLAIN_TOOLS: dict[str, Any] = {"defer_loading": False, "allowed_callers": ["direct"]}

_TEXT = {"type": "string"}
_TEXT_BLOCK = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT_BLOCK}]}
_USE_BLOCK = {
    "type": "object",
    "required": ["type", "id", "name", "input"],
    "properties": {"type": {"const": "tool_use"}, "id": _TEXT, "name": _TEXT, "input": {"type": "object"}},
}
_RESULT_BLOCK = {
    "type": "object",
    "required": ["type", "tool_use_id"],
    "properties": {
        "type": {"const": "tool_result"},
        "tool_use_id": _TEXT,
        "content": _TEXTS,
        "is_error": {"type": "boolean"},
    },
}
_THINKING_BLOCK = {
    "type": "object",
    "required": ["type", "thinking"],
    "properties": {"type": {"const": "thinking"}, "thinking": _TEXT, "signature": _TEXT},
}
SYSTEM_SCHEMA: dict[str, Any] = {"anyOf": [*_TEXTS["anyOf"], {"type": "null"}]}
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "additionalProperties": False,
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {
                "anyOf": [
                    _TEXT,
                    {"type": "array", "items": {"anyOf": [_TEXT_BLOCK, _USE_BLOCK, _RESULT_BLOCK, _THINKING_BLOCK]}},
                ]
            },
        },
    },
}
TOOLS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "input_schema"],
                "properties": {
                    "type": {"enum": ["custom", None]},
                    "name": _TEXT,
                    "description": _TEXT,
                    "input_schema": {"type": "object"},
                },
            },
        },
        {"type": "null"},
    ]
}


class ToolChoice(NamedTuple):
    """What chat calls it: a mode, the function that must be called, whether several calls may come."""

    mode: str | None = None  # none, auto, required
    name: str | None = None
    is_parallel: bool = True


def parse_system(value: Any) -> list[str]:
    """The system prompt's texts. Raises InvalidRequest."""
    return [] if value is None else _texts("system", value)


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """The messages as templates take them: the result of a tool is a message of its own."""
    given = list_at("messages", value, MAX_MESSAGES)
    if not given:
        raise wrong_value("messages", "a list of at least one message", value)
    return [message for index, entry in enumerate(given) for message in _message(f"messages[{index}]", entry)]


def _message(path: str, value: Any) -> list[dict[str, Any]]:
    given = object_at(path, value)
    check_field_names(path, given, ("role", "content"))
    role = given.get("role")
    if role not in ROLES:
        raise wrong_value(f"{path}.role", f"one of {', '.join(ROLES)}", role)
    if "content" not in given:
        raise InvalidRequest(f"{path}.content is required", param=f"{path}.content", code="missing_required_parameter")
    content = given["content"]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = list_at(f"{path}.content", content, MAX_BLOCKS)
    checked = [_block(f"{path}.content[{index}]", block, role) for index, block in enumerate(blocks)]
    if role == "assistant":
        return [_said(checked)]
    return _asked(role, checked)


def _block(path: str, value: Any, role: str) -> dict[str, Any]:
    """One block of a kind that this role may send, its fields checked and named as they came."""
    block = object_at(path, value)
    kind = block.get("type")
    if isinstance(kind, str) and kind in _NOT_TEXT:
        message = f"{path}.type is {kind!r}, and this model takes text only, no {_NOT_TEXT[kind]}"
        raise InvalidRequest(message, param=f"{path}.type", code="unsupported_content")
    allowed = _BLOCKS_OF[role]
    if not isinstance(kind, str) or kind not in allowed:
        raise wrong_value(f"{path}.type", f"one of {', '.join(allowed)} in a message of role {role}", kind)
    check_field_names(path, block, _BLOCKS[kind])
    for name in _STRINGS_OF[kind]:
        string_at(f"{path}.{name}", block.get(name))
    if kind == "tool_use":
        object_at(f"{path}.input", block.get("input"))
    if kind == "tool_result":
        return {**block, "content": _texts(f"{path}.content", block.get("content") or "")}
    return block


def _texts(path: str, value: Any) -> list[str]:
    """A text, or the texts of text blocks."""
    if isinstance(value, str):
        return [value]
    blocks = list_at(path, value, MAX_BLOCKS)
    return [_block(f"{path}[{index}]", block, "system")["text"] for index, block in enumerate(blocks)]


def joined(texts: list[str]) -> str | list[dict[str, str]]:
    """Content of a message: a text, or text parts where there are several."""
    if len(texts) < 2:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _said(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the model said before; thinking that came encrypted tells nobody anything."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for block in blocks:
        by_kind.setdefault(block["type"], []).append(block)
    message: dict[str, Any] = {"role": "assistant", "content": joined([block["text"] for block in by_kind.get("text", [])])}
    if thoughts := by_kind.get("thinking"):
        message["reasoning_content"] = "".join(block["thinking"] for block in thoughts)
    if uses := by_kind.get("tool_use"):
        message["tool_calls"] = [
            {"id": use["id"], "type": "function", "function": {"name": use["name"], "arguments": use["input"]}}
            for use in uses
        ]
    return message


def _asked(role: str, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was sent to the model, in its order."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in blocks:
        if block["type"] == "text":
            texts.append(block["text"])
            continue
        if texts:
            messages.append({"role": role, "content": joined(texts)})
            texts = []
        messages.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": joined(block["content"])})
    if texts or not messages:
        messages.append({"role": role, "content": joined(texts)})
    return messages


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools in OpenAI's shape, which templates know; an empty list is none."""
    if value is None:
        return None
    tools = list_at("tools", value, MAX_TOOLS)
    return [_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)] or None


def _tool(path: str, value: Any) -> dict[str, Any]:
    tool = object_at(path, value)
    kind = tool.get("type")
    if kind not in (None, "custom"):
        message = f"{path}.type {kind!r} is not served: this server runs no tools of its own, only 'custom' ones are"
        raise InvalidRequest(message[:400], param=f"{path}.type", code="unsupported_parameter")
    check_field_names(path, tool, _TOOL_FIELDS)
    for name, plain in _PLAIN_TOOLS.items():
        if tool.get(name) is not None and tool[name] != plain:
            message = f"{path}.{name} is not served by this server, got {shown(tool[name])}"
            raise InvalidRequest(message, param=f"{path}.{name}", code="unsupported_parameter")
    function: dict[str, Any] = {"name": string_at(f"{path}.name", tool.get("name"))}
    if tool.get("description") is not None:
        function["description"] = string_at(f"{path}.description", tool["description"])
    function["parameters"] = object_at(f"{path}.input_schema", tool.get("input_schema"))
    if tool.get("strict") is not None:
        function["strict"] = bool(tool["strict"])
    return {"type": "function", "function": function}


_MODES = {"auto": "auto", "any": "required", "none": "none", "tool": None}


def parse_tool_choice(value: Any) -> ToolChoice:
    """What must be called."""
    if value is None:
        return ToolChoice()
    given = object_at("tool_choice", value)
    check_field_names("tool_choice", given, ("type", "name", "disable_parallel_tool_use"))
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _MODES:
        raise wrong_value("tool_choice.type", f"one of {', '.join(_MODES)}", kind)
    single = given.get("disable_parallel_tool_use")
    if single is not None and not isinstance(single, bool):
        raise wrong_value("tool_choice.disable_parallel_tool_use", "a boolean", single)
    name = string_at("tool_choice.name", given.get("name")) if kind == "tool" else None
    return ToolChoice(_MODES[kind], name, not single)
