"""Hermes, Qwen 2.5 and Qwen 3: each call a JSON object between `<tool_call>` and `</tool_call>`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmd.api.v1 import Constraint, JsonCallParser, ParserSpec, forced_calls, hookimpl


class HermesParser(JsonCallParser):
    """Reads `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

    OPENS = ("<tool_call>",)
    CLOSES = ("</tool_call>",)


def constrain(tools: Sequence[Mapping[str, Any]], choice: str) -> Constraint | None:
    """Calls on lines of their own, as chat templates write them."""
    return forced_calls(
        tools,
        choice,
        call=lambda name, arguments: [
            '<tool_call>\n{"name": ' + json.dumps(name) + ', "arguments": ',
            arguments,
            "}\n</tool_call>",
        ],
        between="\n",
    )


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """The most common format."""
    summary = "<tool_call>{JSON}</tool_call>: Hermes, Qwen 2.5, Qwen 3, Granite 4"
    return [ParserSpec(name="hermes", summary=summary, build=HermesParser, constrain=constrain)]
