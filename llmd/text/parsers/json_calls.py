"""Calls as JSON objects, `{"name": …, "arguments": {…}}`, one by one or in a list, between tags or without."""

from __future__ import annotations

from llmd.text.parsers.reader import ParserSteps
from llmd.text.parsers.scanners import JsonScanner, NotACall, scan_whole
from llmd.text.parsers.tool_parser import ToolParser, decoded

_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset({"name", "type", "function", "id", "index", *_ARGUMENTS})


class JsonCallParser(ToolParser):
    """Reads calls behind a tag. NEEDS_ARGUMENTS: an object is a call only if it has them and nothing unusual."""

    NEEDS_ARGUMENTS = False
    _is_list = False

    def _first(self, tag: str) -> ParserSteps[None]:
        self._is_list = (yield from self._skip_space()) == "["
        if self._is_list:
            yield from self._expect("[")
            yield from self._skip_space()
        yield from self._call()

    def _next(self) -> ParserSteps[None]:
        if (char := (yield from self._skip_space())) and char in ",;":
            yield from self._expect(char)
            if (yield from self._skip_space()) == "]" and self._is_list:
                self._hold()  # a comma in front of the list's end counts for nothing
        yield from self._call()

    def _close(self) -> ParserSteps[None]:
        if (yield from self._skip_space()) == "]" and self._is_list:
            yield from self._expect("]")
            self._hold()
        yield from super()._close()

    def _call(self) -> ParserSteps[None]:
        """One object. Its head is held; once its name is known and its arguments have begun, they stream."""
        yield from self._expect("{")
        name: str | None = None
        arguments: str | None = None
        while name is None or arguments is None:
            key = yield from self._key()
            if key is None:
                break
            if key == "name":
                name = self._check_name((yield from self._string()))
            elif key in _ARGUMENTS and name is not None:
                yield from self._stream(name)
                yield from self._attempt("", self._tail())
                return
            elif key in _ARGUMENTS:
                arguments = yield from self._collect()
            else:
                yield from self._ignore(key)
        self._tell(name, arguments)
        if key is not None:
            yield from self._attempt("", self._tail())

    def _tell(self, name: str | None, arguments: str | None) -> None:
        """A call whose arguments came first, or not at all."""
        if name is None or (arguments is None and self.NEEDS_ARGUMENTS):
            raise NotACall
        self._begin_call(name)
        self._argue("{}" if arguments is None else arguments)

    def _key(self) -> ParserSteps[str | None]:
        """The next member's key, read with its colon; None at the object's end."""
        char = yield from self._skip_space()
        if char == ",":
            yield from self._expect(",")
            char = yield from self._skip_space()
        if char == "}":
            yield from self._expect("}")
            return None
        key = yield from self._string()
        yield from self._skip_space()
        yield from self._expect(":")
        return key

    def _ignore(self, key: str) -> ParserSteps[None]:
        if self.NEEDS_ARGUMENTS and key not in _KEYS:
            raise NotACall
        yield from self._value(JsonScanner(), _nowhere)

    def _tail(self) -> ParserSteps[None]:
        """What stands behind name and arguments."""
        while (yield from self._key()) is not None:
            yield from self._value(JsonScanner(), _nowhere)

    def _stream(self, name: str) -> ParserSteps[None]:
        if (yield from self._skip_space()) == "{":
            self._begin_call(name)
            yield from self._arguments()
        else:
            self._tell(name, (yield from self._collect()))

    def _collect(self) -> ParserSteps[str]:
        """Arguments as a whole: an object, nothing, or a string with an object in it."""
        yield from self._skip_space()
        pieces: list[str] = []
        yield from self._value(JsonScanner(), pieces.append)
        text = "".join(pieces)
        if text.startswith('"'):
            inner = decoded(text).strip()
            text = (scan_whole(JsonScanner(), inner) or "") if inner else "null"
        if text == "null":
            return "{}"
        if not text.startswith("{"):
            raise NotACall
        return text


def _nowhere(text: str) -> None:
    """Takes text that nobody wants."""


class BareJsonCallParser(JsonCallParser):
    """Calls without a tag: at the start of the answer or of a line."""

    NEEDS_ARGUMENTS = True
    STARTS: tuple[str, ...] = ("{", "[")
    OPENS: tuple[str, ...] = ("\n{",)
