"""Tools as clients write them: checked, and in one form whether they came as `tools` or as the older `functions`."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import InvalidRequest, shown
from llmd_plugins.openai.messages import object_at, string_at, wrong

MAX_TOOLS = 1024
_CHOICES = ("none", "auto", "required")

_TEXT = {"type": "string"}
_FUNCTION: dict[str, Any] = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "minLength": 1}, "description": _TEXT, "parameters": {"type": "object"}},
}
TOOLS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    },
}
FUNCTIONS_SCHEMA: dict[str, Any] = {"type": "array", "items": _FUNCTION}
_NAMED = {"type": "object", "required": ["name"], "properties": {"name": _TEXT}}
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": [*_CHOICES, None]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {"type": {"const": "function"}, "function": _NAMED},
        },
    ]
}
FUNCTION_CALL_SCHEMA = {"anyOf": [{"enum": ["none", "auto", None]}, _NAMED]}


def _listed(path: str, value: Any) -> list[Any] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise wrong(path, f"a list of at most {MAX_TOOLS} {path}", value)
    return value


def check_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools as they were given; an empty list is none."""
    for index, entry in enumerate(tools := _listed("tools", value) or ()):
        tool = object_at(f"tools[{index}]", entry)
        if tool.get("type") != "function":
            raise wrong(f"tools[{index}].type", "'function'", tool.get("type"))
        _check_function(f"tools[{index}].function", tool.get("function"))
    return list(tools) or None


def check_functions(value: Any) -> list[dict[str, Any]] | None:
    """The older form, as tools."""
    functions = _listed("functions", value) or ()
    for index, entry in enumerate(functions):
        _check_function(f"functions[{index}]", entry)
    return [{"type": "function", "function": function} for function in functions] or None


def _check_function(path: str, value: Any) -> None:
    function = object_at(path, value)
    if not string_at(f"{path}.name", function.get("name")):
        raise wrong(f"{path}.name", "a string of at least one character", "")
    if function.get("parameters") is not None:
        object_at(f"{path}.parameters", function["parameters"])


def parse_tool_choice(value: Any) -> str | None:
    """none, auto, required, or the name of the function that must be called."""
    if value is None or value in _CHOICES:
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type", "function") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        allowed = "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': …}}"
        raise InvalidRequest(f"tool_choice must be {allowed}, got {shown(value)}", param="tool_choice", code="invalid_value")
    return name


def parse_function_call(value: Any) -> str | None:
    """none, auto, or the name of the function that must be called."""
    if value is None or value in ("none", "auto"):
        return value
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        allowed = "'none', 'auto' or {'name': …}"
        raise InvalidRequest(f"function_call must be {allowed}, got {shown(value)}", param="function_call")
    return name
