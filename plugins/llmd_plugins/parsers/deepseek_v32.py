"""DeepSeek V3.2 and V4: calls as markup whose parameters say whether they are strings."""

from __future__ import annotations

import re

from llmd.api.v1 import MarkupCallParser, ParserSpec, hookimpl

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


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Under the names of both generations."""
    summary = "<｜DSML｜invoke …>: DeepSeek V3.2, V4"
    return [ParserSpec(name=name, summary=summary, build=DeepSeekV32Parser) for name in ("deepseek_v32", "deepseek_v4")]
