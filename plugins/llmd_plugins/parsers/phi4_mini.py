"""Phi-4-mini: `functools` and a JSON list of calls, or `<|tool_call|>` and one of them."""

from __future__ import annotations

from llmd.api.v1 import CallForm, JsonCallParser, ParserSpec, hookimpl, json_call


class Phi4MiniParser(JsonCallParser):
    """Reads `functools[{"name": …, "arguments": {…}}, …]` and `<|tool_call|>…<|/tool_call|>`."""

    OPENS = ("functools[", "<|tool_call|>")
    CLOSES = ("<|/tool_call|>",)


FORM = CallForm(
    call=json_call('{"name": {name}, "arguments": ', "}"),
    begin="functools[",
    between=", ",
    end="]",
    opens=Phi4MiniParser.OPENS,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Phi-4-mini, under both of its names."""
    summary = "functools[JSON list]: Phi-4-mini"
    names = ("phi4_mini", "phi4_mini_json")
    return [ParserSpec(name=name, summary=summary, build=Phi4MiniParser, form=FORM) for name in names]
