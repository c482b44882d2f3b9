"""Qwen3-Coder, Qwen 3.5 and others: functions and parameters as tags, values as plain text on lines of their own."""

from __future__ import annotations

from llmd.api.v1 import CallForm, MarkupCallParser, MarkupStyle, ParserSpec, hookimpl, markup_call


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


STYLE = MarkupStyle(
    head="<function={name}>\n",
    key="<parameter={key}>\n",
    value_end="\n</parameter>\n",
    tail="</function>",
    ends=Qwen3CoderParser.VALUE_ENDS,
)
FORM = CallForm(
    call=markup_call(STYLE),
    begin="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    end="\n</tool_call>",
    opens=Qwen3CoderParser.OPENS,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Under both of its names."""
    summary = "<function=…><parameter=…>: Qwen3-Coder, Qwen 3.5, Nemotron 3"
    names = ("qwen3_coder", "qwen3_xml")
    return [ParserSpec(name=name, summary=summary, build=Qwen3CoderParser, form=FORM) for name in names]
