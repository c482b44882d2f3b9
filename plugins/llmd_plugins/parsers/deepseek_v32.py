"""DeepSeek V3.2 and V4: calls as markup whose parameters say whether they are strings."""

from __future__ import annotations

import re

from llmd.api.v1 import CallForm, MarkupCallParser, MarkupStyle, ParserSpec, hookimpl, markup_call

_STRING_MARK = re.compile(r'(?P<key>.*?)"\s+string="(?P<is_string>true|false)', re.DOTALL)


class DeepSeekV32Parser(MarkupCallParser):
    """Reads `<｜DSML｜invoke name="f">` with its `<｜DSML｜parameter name="a" string="true">value</｜DSML｜parameter>`."""

    OPENS = ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>")
    CLOSES = ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>")
    FUNCTION, FUNCTION_END = "<｜DSML｜invoke name=", ">"
    KEY, KEY_END = "<｜DSML｜parameter name=", ">"
    VALUE_ENDS = ("</｜DSML｜parameter>",)
    CALL_END = "</｜DSML｜invoke>"

    def _read_key(self, name: str, key: str) -> tuple[str, frozenset[str]]:
        match = _STRING_MARK.fullmatch(key)
        if match is None:
            return super()._read_key(name, key)
        if match["is_string"] == "true":
            return match["key"], frozenset({"string"})
        return match["key"], self._schemas.types(name, match["key"]) - {"string"}


def _form(begin: str, end: str) -> CallForm:
    style = MarkupStyle(
        head='<｜DSML｜invoke name="{name}">\n',
        key='<｜DSML｜parameter name="{key}" string="{is_string}">',
        value_end="</｜DSML｜parameter>\n",
        tail="</｜DSML｜invoke>\n",
        ends=DeepSeekV32Parser.VALUE_ENDS,
    )
    return CallForm(call=markup_call(style), begin=f"{begin}\n", end=end, opens=(begin, *DeepSeekV32Parser.OPENS))


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Under the names of both generations."""
    summary = "<｜DSML｜invoke …>: DeepSeek V3.2, V4"
    tags = zip(("deepseek_v32", "deepseek_v4"), DeepSeekV32Parser.OPENS, DeepSeekV32Parser.CLOSES, strict=True)
    return [
        ParserSpec(name=name, summary=summary, build=DeepSeekV32Parser, form=_form(begin, end)) for name, begin, end in tags
    ]
