"""Calls as Python writes them, in a list: Llama 4, Llama 3.2, ToolACE and others."""

from __future__ import annotations

import json
import re

from llmd.api.v1 import CallForm, NotACall, ParserSpec, ParserSteps, PythonScanner, ToolParser, hookimpl, keyword_call

_NAME_CHAR = re.compile(r"[\w.\-]")
_MAX_NAME = 256


class PythonicParser(ToolParser):
    """Reads `[f(a=1, b="x"), g()]` at the start of the answer. Arguments must have names; their values are literals."""

    STARTS = ("[",)
    OPENS = ("<|python_start|>", "<|python_tag|>")
    CLOSES = ("<|python_end|>",)

    def _first(self, tag: str) -> ParserSteps[None]:
        yield from self._skip_space()
        yield from self._expect("[")
        yield from self._call()

    def _next(self) -> ParserSteps[None]:
        yield from self._skip_space()
        yield from self._expect(",")
        if (yield from self._skip_space()) == "]":
            self._hold()  # a comma in front of the list's end counts for nothing
            raise NotACall
        yield from self._call()

    def _close(self) -> ParserSteps[None]:
        yield from self._skip_space()
        yield from self._expect("]")
        self._hold()
        yield from super()._close()

    def _call(self) -> ParserSteps[None]:
        """The head is held up to the first argument's name."""
        name = yield from self._word("(")
        key = None if (yield from self._skip_space()) == ")" else (yield from self._word("="))
        self._begin_call(self._check_name(name))
        yield from self._members(key)

    def _members(self, key: str | None) -> ParserSteps[None]:
        self._argue("{")
        while key is not None:
            self._argue(f"{json.dumps(key, ensure_ascii=False)}: ")
            yield from self._skip_space()
            yield from self._arguments(PythonScanner())
            key = yield from self._next_key()
        yield from self._expect(")")
        self._argue("}")

    def _next_key(self) -> ParserSteps[str | None]:
        if (yield from self._skip_space()) == ",":
            yield from self._expect(",")
            yield from self._skip_space()
        if (yield from self._peek()) in ("", ")"):
            return None
        self._hold()
        try:
            key = yield from self._word("=")
        except NotACall:
            self._argue("".join(self._held or ()))
            self._drop()
            yield from self._broken_arguments()
        self._drop()
        self._argue(", ")
        return key

    def _word(self, end: str) -> ParserSteps[str]:
        """A name and the character that must follow it."""
        word = ""
        char = yield from self._skip_space()
        while char and _NAME_CHAR.match(char):
            if len(word) >= _MAX_NAME:
                raise NotACall
            yield from self._expect(char)
            word += char
            char = yield from self._peek()
        yield from self._skip_space()
        yield from self._expect(end)
        if not word:
            raise NotACall
        return word


FORM = CallForm(
    call=keyword_call, begin="[", between=", ", end="]", opens=PythonicParser.OPENS, starts="".join(PythonicParser.STARTS)
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Under its own name and that of Llama 4."""
    plain, tagged = "[f(a=1), g()]: Llama 3.2, ToolACE, Olmo 3", "<|python_start|>[f(a=1)]<|python_end|>: Llama 4"
    return [
        ParserSpec(name="pythonic", summary=plain, build=PythonicParser, form=FORM),
        ParserSpec(name="llama4_pythonic", summary=tagged, build=PythonicParser, form=FORM),
    ]
