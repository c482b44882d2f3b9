"""GLM 4.5 to 4.7: the name, then each key and value between tags of their own."""

from __future__ import annotations

from llmd.api.v1 import CallForm, MarkupCallParser, MarkupStyle, ParserSpec, ParserSteps, hookimpl, markup_call


class Glm45Parser(MarkupCallParser):
    """Reads `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`."""

    OPENS = ("<tool_call>",)
    FUNCTION = "<tool_call>"
    KEY, KEY_END = "<arg_key>", "</arg_key>"
    VALUE = "<arg_value>"
    VALUE_ENDS = ("</arg_value>",)
    CALL_END = "</tool_call>"

    def _call(self) -> ParserSteps[None]:
        name, tag = yield from self._head((self.KEY, self.CALL_END))
        name = self._check_name(name.strip())
        self._unread(len(tag))
        self._begin_call(name)
        yield from self._members(name)


STYLE = MarkupStyle(
    head="{name}\n",
    key="<arg_key>{key}</arg_key>\n<arg_value>",
    value_end="</arg_value>\n",
    tail="",
    ends=Glm45Parser.VALUE_ENDS,
)
FORM = CallForm(
    call=markup_call(STYLE),
    begin="<tool_call>",
    between="</tool_call>\n<tool_call>",
    end="</tool_call>",
    opens=Glm45Parser.OPENS,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Under the names of both generations."""
    summary = "<tool_call>name<arg_key>…<arg_value>…: GLM 4.5 to 4.7"
    return [ParserSpec(name=name, summary=summary, build=Glm45Parser, form=FORM) for name in ("glm45", "glm47")]
