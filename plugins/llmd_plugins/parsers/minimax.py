"""MiniMax: M2 writes calls as tags, M1 as JSON objects on lines of their own."""

from __future__ import annotations

from llmd.api.v1 import CallForm, JsonCallParser, MarkupCallParser, MarkupStyle, ParserSpec, hookimpl, json_call, markup_call


class MiniMaxM2Parser(MarkupCallParser):
    """Reads `<minimax:tool_call><invoke name="…"><parameter name="…">value</parameter></invoke></minimax:tool_call>`."""

    OPENS = ("<minimax:tool_call>",)
    CLOSES = ("</minimax:tool_call>",)
    FUNCTION, FUNCTION_END = "<invoke name=", ">"
    KEY, KEY_END = "<parameter name=", ">"
    VALUE_ENDS = ("</parameter>", "<parameter name=", "</invoke>")
    CALL_END = "</invoke>"


class MiniMaxM1Parser(JsonCallParser):
    """Reads `<tool_calls>` and JSON objects, one a line, up to `</tool_calls>`."""

    OPENS = ("<tool_calls>",)
    CLOSES = ("</tool_calls>",)


STYLE = MarkupStyle(
    head='<invoke name="{name}">\n',
    key='<parameter name="{key}">',
    value_end="</parameter>\n",
    tail="</invoke>\n",
    ends=MiniMaxM2Parser.VALUE_ENDS,
)
M2 = CallForm(
    call=markup_call(STYLE), begin="<minimax:tool_call>\n", end="</minimax:tool_call>", opens=MiniMaxM2Parser.OPENS
)
M1 = CallForm(
    call=json_call('{"name": {name}, "arguments": ', "}"),
    begin="<tool_calls>\n",
    between="\n",
    end="\n</tool_calls>",
    opens=MiniMaxM1Parser.OPENS,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Both generations."""
    two, one = "<minimax:tool_call><invoke …>: MiniMax M2", "<tool_calls>{JSON} lines: MiniMax M1"
    return [
        ParserSpec(name="minimax_m2", summary=two, build=MiniMaxM2Parser, form=M2),
        ParserSpec(name="minimax", summary=one, build=MiniMaxM1Parser, form=M1),
    ]
