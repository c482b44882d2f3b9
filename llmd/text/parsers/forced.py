"""Grammars that force calls: the format's text around arguments that follow the function's schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmd.text.parsers.schemas import ToolSchemas

if TYPE_CHECKING:
    from llmd.text.structured import Constraint

MAX_CALLS = 16
# JSON as chat templates write it, and no white space beyond that
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def forced_calls(
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    *,
    call: Callable[[str, str], Sequence[str]],
    begin: str = "",
    between: str = "",
    end: str = "",
) -> Constraint | None:
    """A Lark grammar for one call of the function `choice`, or ("required") for one or more calls of any.

    `call(name, arguments)` gives the texts of a call, among them `arguments` unchanged, where these stand. None without
    tools to choose from.
    """
    from llmd.text.structured import Constraint

    schemas = ToolSchemas(tools)
    names = [name for name in schemas.names if choice in (name, "required")]
    if not names:
        return None
    more = f" ({json.dumps(between)} call){{0,{MAX_CALLS - 1}}}" if choice == "required" else ""
    lines = [f"start: {_terms([begin])} call{more} {_terms([end])}"]
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(names))))
    for index, name in enumerate(names):
        lines.append(f"call_{index}: {_terms(call(name, f'arguments_{index}'), f'arguments_{index}')}")
        lines.append(f"arguments_{index}: %json {json.dumps(_object(schemas.parameters(name)), ensure_ascii=False)}")
    return Constraint("grammar", "\n".join(lines), "tool_choice")


def _terms(texts: Sequence[str], rule: str = "") -> str:
    return " ".join(text if text == rule else json.dumps(text, ensure_ascii=False) for text in texts if text)


def _object(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **schema, "x-guidance": _COMPACT}
