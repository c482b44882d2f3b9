"""DeepSeek V3, R1 and V3.1: calls between special tokens; V3 puts a kind in front and the arguments in a code block."""

from __future__ import annotations

from llmd.api.v1 import CallForm, HeadedCallParser, NotACall, ParserSpec, ParserSteps, hookimpl, json_call, plain_name

_FENCE = "\n```json"


class DeepSeekParser(HeadedCallParser):
    """Reads `name<sep>{…}` (V3.1) and `function<sep>name`, then a fenced object (V3), whichever comes."""

    SECTION, BEGIN = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"
    SEPARATOR = "<｜tool▁sep｜>"
    END = "<｜tool▁call▁end｜>"
    OPENS = (SECTION, BEGIN)
    CLOSES = (END, "<｜tool▁calls▁end｜>")

    def _read_head(self, head: str) -> ParserSteps[tuple[str, str | None]]:
        if (yield from self._skip_space()) == "{":
            return head, None
        if head != "function":
            raise NotACall
        name, _ = yield from self._head((_FENCE,))
        return name.strip(), None

    def _end_call(self) -> ParserSteps[None]:
        yield from self._skip_space()
        if (yield from self._accept("```")):
            yield from self._skip_space()
        yield from self._expect(self.END)


def _form(head: str, tail: str, between: str) -> CallForm:
    begin, separator, end = DeepSeekParser.BEGIN, DeepSeekParser.SEPARATOR, DeepSeekParser.END
    call = json_call(begin + head.replace("{sep}", separator), tail + end, name=plain_name)
    close = DeepSeekParser.CLOSES[-1]
    return CallForm(call=call, begin=DeepSeekParser.SECTION, between=between, end=close, opens=DeepSeekParser.OPENS)


FENCED = _form("function{sep}{name}" + _FENCE + "\n", "\n```", "\n")
BARE = _form("{name}{sep}", "", "")


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Under the names of the generations."""
    whole = "<｜tool▁call▁begin｜>function, name, code block: DeepSeek V3, R1"
    short = "<｜tool▁call▁begin｜>name, {…}: DeepSeek V3.1"
    return [
        ParserSpec(name="deepseek_v3", summary=whole, build=DeepSeekParser, form=FENCED),
        ParserSpec(name="deepseek_v31", summary=short, build=DeepSeekParser, form=BARE),
    ]
