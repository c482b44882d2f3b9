"""MiniMax: M2 writes calls as tags, M1 as JSON objects on lines of their own."""

from __future__ import annotations

from llmd.api.v1 import JsonCallParser, MarkupCallParser, ParserSpec, hookimpl


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


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Both generations."""
    return [
        ParserSpec(name="minimax_m2", summary="<minimax:tool_call><invoke …>: MiniMax M2", build=MiniMaxM2Parser),
        ParserSpec(name="minimax", summary="<tool_calls>{JSON} lines: MiniMax M1", build=MiniMaxM1Parser),
    ]
