"""Jamba: a JSON list of calls between `<tool_calls>` and `</tool_calls>`."""

from __future__ import annotations

from llmd.api.v1 import CallForm, JsonCallParser, ParserSpec, hookimpl, json_call


class JambaParser(JsonCallParser):
    """Reads `<tool_calls>[{"name": …, "arguments": {…}}, …]</tool_calls>`."""

    OPENS = ("<tool_calls>",)
    CLOSES = ("</tool_calls>",)


FORM = CallForm(
    call=json_call('{"name": {name}, "arguments": ', "}"),
    begin="<tool_calls>[",
    between=", ",
    end="]</tool_calls>",
    opens=JambaParser.OPENS,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Jamba 1.5 and later."""
    summary = "<tool_calls>[JSON list]</tool_calls>: Jamba"
    return [ParserSpec(name="jamba", summary=summary, build=JambaParser, form=FORM)]
