"""Calls as markup, each argument as plain text between tags. Strings stream; other values are told when they are whole."""

from __future__ import annotations

import json

from llmd.text.parsers.reader import MAX_HELD, ParserSteps
from llmd.text.parsers.scanners import NotACall
from llmd.text.parsers.schemas import STRING, to_json
from llmd.text.parsers.tool_parser import ToolParser


class PlainValue:
    """Turns the pieces of one argument's text into pieces of JSON text."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
        self._pieces: list[str] = []
        self._room = 0 if types == STRING else MAX_HELD
        self._is_string = False

    def push(self, text: str) -> str:
        """JSON text that is certain: nothing while the value may be more than a string."""
        if not self._is_string and len(text) <= self._room:
            self._pieces.append(text)
            self._room -= len(text)
            return ""
        text = "".join(self._pieces) + text
        self._pieces.clear()
        begin = "" if self._is_string else '"'
        self._is_string = True
        return begin + _escaped(text)

    def finish(self) -> str:
        """The rest of the JSON text."""
        if self._is_string:
            return '"'
        return '""' if self._types == STRING else to_json("".join(self._pieces), self._types)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


class MarkupCallParser(ToolParser):
    """`FUNCTION name FUNCTION_END`, then for each argument `KEY name KEY_END value VALUE_ENDS`, then CALL_END."""

    FUNCTION = ""
    FUNCTION_END = ""
    KEY = ""
    KEY_END = ""
    VALUE = ""  # what stands between the key's end and the value
    VALUE_ENDS: tuple[str, ...] = ()  # the first is the right one, others are taken where it is missing
    CALL_END = ""
    HAS_LINES = False  # a value stands on lines of its own

    def _first(self, tag: str) -> ParserSteps[None]:
        if tag != self.FUNCTION:
            yield from self._skip_space()
            yield from self._expect(self.FUNCTION)
        yield from self._call()

    def _next(self) -> ParserSteps[None]:
        yield from self._skip_space()
        yield from self._expect(self.FUNCTION)
        yield from self._call()

    def _call(self) -> ParserSteps[None]:
        name, _ = yield from self._head((self.FUNCTION_END,))
        name = self._check_name(name.strip().strip("\"'"))
        self._begin_call(name)
        yield from self._members(name)

    def _members(self, name: str) -> ParserSteps[None]:
        """The arguments and the call's end."""
        self._argue("{")
        num_arguments = 0
        while (tag := (yield from self._until((self.KEY, self.CALL_END), self._say))) == self.KEY:
            self._space.take()
            if (yield from self._attempt(tag, self._argument(name, num_arguments))):
                num_arguments += 1
        self._space.take()
        if tag is None:
            raise NotACall
        self._argue("}")

    def _argument(self, name: str, index: int) -> ParserSteps[None]:
        head, _ = yield from self._head((self.KEY_END,))
        if self.VALUE:
            yield from self._skip_space()
            yield from self._expect(self.VALUE)
        self._drop()
        if self.HAS_LINES:
            yield from self._accept("\n")
        key, types = self._read_key(name, head.strip().strip("\"'"))
        self._argue(f"{', ' if index else ''}{json.dumps(key, ensure_ascii=False)}: ")
        yield from self._plain_value(PlainValue(types))

    def _read_key(self, name: str, key: str) -> tuple[str, frozenset[str]]:
        """An argument's name and the types it may have."""
        return key, self._schemas.types(name, key)

    def _plain_value(self, value: PlainValue) -> ParserSteps[None]:
        right_end = self.VALUE_ENDS[0]
        ends = (*(f"\n{end}" for end in self.VALUE_ENDS), right_end) if self.HAS_LINES else self.VALUE_ENDS
        tag = yield from self._until(ends, lambda text: self._argue(value.push(text)))
        if tag is None:
            raise NotACall
        self._argue(value.finish())
        if not tag.endswith(right_end):  # the end is missing: what comes next is read as that
            self._unread(len(tag) - 1)
