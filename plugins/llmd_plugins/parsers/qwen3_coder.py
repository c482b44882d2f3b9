"""Qwen3-Coder, Qwen 3.5 and others: functions and parameters as tags, values as plain text on lines of their own."""

from __future__ import annotations

from llmd.api.v1 import MarkupCallParser, ParserSpec, hookimpl


class Qwen3CoderParser(MarkupCallParser):
    """Reads `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`.

    The outer tag may be missing, as it often is.
    """

    OPENS = ("<tool_call>", "<function=")
    CLOSES = ("</tool_call>",)
    FUNCTION, FUNCTION_END = "<function=", ">"
    KEY, KEY_END = "<parameter=", ">"
    VALUE_ENDS = ("</parameter>", "<parameter=", "</function>")
    CALL_END = "</function>"
    HAS_LINES = True


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Under both of its names."""
    summary = "<function=…><parameter=…>: Qwen3-Coder, Qwen 3.5, Nemotron 3"
    return [ParserSpec(name=name, summary=summary, build=Qwen3CoderParser) for name in ("qwen3_coder", "qwen3_xml")]
