"""Phi-4-mini: `functools` and a JSON list of calls, or `<|tool_call|>` and one of them."""

from __future__ import annotations

from llmd.api.v1 import JsonCallParser, ParserSpec, hookimpl


class Phi4MiniParser(JsonCallParser):
    """Reads `functools[{"name": …, "arguments": {…}}, …]` and `<|tool_call|>…<|/tool_call|>`."""

    OPENS = ("functools[", "<|tool_call|>")
    CLOSES = ("<|/tool_call|>",)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Phi-4-mini, under both of its names."""
    summary = "functools[JSON list]: Phi-4-mini"
    return [ParserSpec(name=name, summary=summary, build=Phi4MiniParser) for name in ("phi4_mini", "phi4_mini_json")]
