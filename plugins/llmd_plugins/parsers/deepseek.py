"""DeepSeek V3, R1 and V3.1: calls between special tokens; V3 puts a kind in front and the arguments in a code block."""

from __future__ import annotations

from llmd.api.v1 import HeadedCallParser, NotACall, ParserSpec, ParserSteps, hookimpl

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


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Under the names of the generations."""
    whole = "<｜tool▁call▁begin｜>function, name, code block: DeepSeek V3, R1"
    short = "<｜tool▁call▁begin｜>name, {…}: DeepSeek V3.1"
    return [
        ParserSpec(name="deepseek_v3", summary=whole, build=DeepSeekParser),
        ParserSpec(name="deepseek_v31", summary=short, build=DeepSeekParser),
    ]
