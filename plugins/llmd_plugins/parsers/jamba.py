"""Jamba: a JSON list of calls between `<tool_calls>` and `</tool_calls>`."""

from __future__ import annotations

from llmd.api.v1 import JsonCallParser, ParserSpec, hookimpl


class JambaParser(JsonCallParser):
    """Reads `<tool_calls>[{"name": …, "arguments": {…}}, …]</tool_calls>`."""

    OPENS = ("<tool_calls>",)
    CLOSES = ("</tool_calls>",)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Jamba 1.5 and later."""
    return [ParserSpec(name="jamba", summary="<tool_calls>[JSON list]</tool_calls>: Jamba", build=JambaParser)]
