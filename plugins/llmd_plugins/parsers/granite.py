"""Granite 3: a list of calls behind `<|tool_call|>` or `<tool_call>`; reasoning announced by sentences."""

from __future__ import annotations

from llmd.api.v1 import CallForm, JsonCallParser, ParserSpec, ThinkingParser, hookimpl, json_call


class GraniteParser(JsonCallParser):
    """Reads `<|tool_call|>[{"name": …, "arguments": {…}}, …]`."""

    OPENS = ("<|tool_call|>", "<tool_call>")
    CLOSES = ("</tool_call>",)


FORM = CallForm(
    call=json_call('{"name": {name}, "arguments": ', "}"),
    begin="<|tool_call|>[",
    between=", ",
    end="]",
    opens=GraniteParser.OPENS,
)


class GraniteThinkingParser(ThinkingParser):
    """Reads the sentences of Granite 3.2 and the tags of Granite 3.3."""

    OPENS = ("Here is my thought process:", "Here's my thought process:", "<think>")
    CLOSES = ("Here is my response:", "Here's my response:", "</think>")
    WRAPS = (("<response>", "</response>"),)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Granite 3.0 to 3.3."""
    return [ParserSpec(name="granite", summary="<|tool_call|>[JSON list]: Granite 3", build=GraniteParser, form=FORM)]


@hookimpl
def llmd_register_reasoning_parsers() -> list[ParserSpec]:
    """Granite 3.2 and 3.3."""
    summary = "Here is my thought process: … Here is my response: … (Granite 3)"
    return [ParserSpec(name="granite", summary=summary, build=GraniteThinkingParser)]
