"""Follow one JSON value, or one Python literal, while its text comes: where does it end, and what is it as JSON?

The text that comes out is valid JSON whenever the value came to its end. What models get wrong and can mean one thing only
is put right: control characters and unknown escapes in strings, a comma before a bracket that closes, True, False, None.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from enum import Enum

MAX_DEPTH = 200
MAX_SCALAR = 1000  # characters of a number or a word

_SPACE = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r"""[^\s,:\[\]{}()"'<>;]+""")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_HEX = re.compile(r"[0-9a-fA-F]*")
_PLAIN = {quote: re.compile(rf'[^"\\\x00-\x1f{quote}]*') for quote in "\"'"}
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}


class NotACall(Exception):  # a finding, no fault
    """What is being read is not what it was taken for."""


class BrokenValue(NotACall):
    """Not JSON (or Python) from `at` on."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


class _State(Enum):
    VALUE = "a value"
    FIRST = "a value or the end of the list"
    KEY = "a key or the end of the object"
    COLON = "a colon"
    NEXT = "a comma or the end"
    STRING = "in a string"


class JsonScanner:
    """Reads one value. `is_done` is set when it ended; what follows is not touched."""

    QUOTES = '"'
    OPENING = "[{"

    def __init__(self) -> None:
        self.is_done = False
        self._state = _State.VALUE
        self._closing: list[str] = []  # of the lists and objects that are open
        self._is_key = False
        self._quote = ""
        self._comma = ""  # one that counts only when something follows it
        self._out: list[str] = []

    def take(self) -> str:
        """The JSON text since the last call."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def feed(self, text: str, at: int, end: int, *, is_last: bool = False) -> int:
        """Read text[at:end]; returns where reading stopped. Raises BrokenValue. What is cut in its middle is left unread."""
        while not self.is_done and at < end:
            stop = (
                self._string(text, at, end, is_last) if self._state is _State.STRING else self._token(text, at, end, is_last)
            )
            if stop == at:
                break
            at = stop
        return at

    # --- between strings

    def _token(self, text: str, at: int, end: int, is_last: bool) -> int:
        space = _SPACE.match(text, at, end)
        if space is not None and space.end() > at:
            self._write_space(space.group())
            return space.end()
        char = text[at]
        if self._closing and char == self._closing[-1] and self._state in (_State.FIRST, _State.KEY, _State.NEXT):
            return self._close(char, at)
        if self._state is _State.NEXT:
            return self._after_value(char, at)
        if self._state is _State.COLON:
            if char != ":":
                raise BrokenValue(at)
            self._write(":", _State.VALUE)
            return at + 1
        return self._value(text, at, end, is_last)

    def _write_space(self, space: str) -> None:
        if self._comma:
            self._comma = (self._comma + space)[:64]
        else:
            self._out.append(space)

    def _write(self, text: str, state: _State) -> None:
        self._out += (self._comma, text)
        self._comma = ""
        self._state = state

    def _after_value(self, char: str, at: int) -> int:
        if char != ",":
            raise BrokenValue(at)
        self._comma = ","
        self._state = _State.KEY if self._closing[-1] == "}" else _State.FIRST
        return at + 1

    def _close(self, char: str, at: int) -> int:
        self._comma = ""
        self._closing.pop()
        self._end("]" if char == ")" else char)
        return at + 1

    def _end(self, text: str) -> None:
        """A value ended with `text`."""
        self._write(text, _State.NEXT)
        self.is_done = not self._closing

    def _value(self, text: str, at: int, end: int, is_last: bool) -> int:
        char = text[at]
        if char in self.QUOTES:
            return self._open_string(text, at, end, is_last)
        if self._state is _State.KEY:
            raise BrokenValue(at)
        if char in self.OPENING:
            return self._open(char, at)
        return self._scalar(text, at, end, is_last)

    def _open(self, char: str, at: int) -> int:
        if len(self._closing) >= MAX_DEPTH:
            raise BrokenValue(at)
        self._closing.append({"{": "}", "[": "]", "(": ")"}[char])
        self._write("{" if char == "{" else "[", _State.KEY if char == "{" else _State.FIRST)
        return at + 1

    def _scalar(self, text: str, at: int, end: int, is_last: bool) -> int:
        match = _SCALAR.match(text, at, min(end, at + MAX_SCALAR + 1))
        if match is None or match.end() - at > MAX_SCALAR:
            raise BrokenValue(at)
        if match.end() == end and not is_last:
            return at
        scalar = self._as_json(match.group())
        if scalar is None:
            raise BrokenValue(at)
        self._end(scalar)
        return match.end()

    def _as_json(self, scalar: str) -> str | None:
        return scalar if _NUMBER.fullmatch(scalar) else _WORDS.get(scalar)

    # --- strings

    def _open_string(self, text: str, at: int, end: int, is_last: bool) -> int:
        self._quote = text[at]
        self._begin_string()
        return at + 1

    def _begin_string(self) -> None:
        self._is_key = self._state is _State.KEY
        self._write('"', _State.STRING)

    def _string(self, text: str, at: int, end: int, is_last: bool) -> int:
        plain = _PLAIN[self._quote[0]].match(text, at, end)
        if plain is not None and plain.end() > at:
            self._out.append(plain.group())
            return plain.end()
        char = text[at]
        if char == "\\":
            return self._escape(text, at, end, is_last)
        if char == self._quote[0]:
            return self._close_string(text, at, end, is_last)
        self._out.append(json.dumps(char)[1:-1])
        return at + 1

    def _close_string(self, text: str, at: int, end: int, is_last: bool) -> int:
        if self._is_key:
            self._write('"', _State.COLON)
        else:
            self._end('"')
        return at + 1

    def _escape(self, text: str, at: int, end: int, is_last: bool) -> int:
        if at + 1 >= end:
            return at
        char = text[at + 1]
        if char == "u":
            return self._code_point(text, at, end, is_last, 4)
        if char in '"\\/bfnrt':
            self._out.append(text[at : at + 2])
        else:
            self._out.append("'" if char == "'" else json.dumps(text[at : at + 2])[1:-1])
        return at + 2

    def _code_point(self, text: str, at: int, end: int, is_last: bool, num_digits: int) -> int:
        """`\\u` and so many hexadecimal digits; fewer are no escape."""
        digits = _HEX.match(text, at + 2, min(end, at + 2 + num_digits))
        num_found = 0 if digits is None else digits.end() - digits.start()
        if num_found < num_digits:
            if at + 2 + num_found == end and not is_last:
                return at
            self._out.append(json.dumps(text[at : at + 2])[1:-1])
            return at + 2
        code = int(text[at + 2 : at + 2 + num_digits], 16)
        self._out.append(
            f"\\u{code:04x}" if code < 0x10000 else json.dumps(chr(code))[1:-1] if code < 0x110000 else "\\ufffd"
        )
        return at + 2 + num_digits


class PythonScanner(JsonScanner):
    """Reads a Python literal of strings, numbers, lists, tuples and dicts with string keys."""

    QUOTES = "\"'"
    OPENING = "[{("
    ESCAPES = {"\\": "\\\\", "'": "'", '"': '\\"', "n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", "\n": "",
               "a": "\\u0007", "v": "\\u000b", "0": "\\u0000"}  # fmt: skip

    def _as_json(self, scalar: str) -> str | None:
        return super()._as_json(scalar) or _python_number(scalar)

    def _open_string(self, text: str, at: int, end: int, is_last: bool) -> int:
        quote = text[at]
        opening = text[at : min(at + 3, end)]
        if opening == quote * len(opening) and len(opening) < 3 and not is_last:
            return at  # empty, or three quotes
        self._quote = quote * 3 if opening == quote * 3 else quote
        self._begin_string()
        return at + len(self._quote)

    def _close_string(self, text: str, at: int, end: int, is_last: bool) -> int:
        found = text[at : min(at + len(self._quote), end)]
        if found == self._quote:
            super()._close_string(text, at, end, is_last)
            return at + len(found)
        if self._quote.startswith(found) and not is_last:
            return at
        self._out.append(json.dumps(text[at])[1:-1])
        return at + 1

    def _escape(self, text: str, at: int, end: int, is_last: bool) -> int:
        if at + 1 >= end:
            return at
        char = text[at + 1]
        num_digits = {"x": 2, "u": 4, "U": 8}.get(char)
        if num_digits is not None:
            return self._code_point(text, at, end, is_last, num_digits)
        self._out.append(self.ESCAPES.get(char) if char in self.ESCAPES else json.dumps(text[at : at + 2])[1:-1])  # type: ignore[arg-type]
        return at + 2


def _python_number(scalar: str) -> str | None:
    for convert in (lambda: int(scalar, 0), lambda: float(scalar)):
        with suppress(ValueError):
            number = convert()
            return str(number) if math.isfinite(number) else None
    return None


def scan_whole(scanner: JsonScanner, text: str) -> str | None:
    """The JSON text of a text that is one value with nothing behind it; None when it is not."""
    try:
        end = scanner.feed(text, 0, len(text), is_last=True)
    except BrokenValue:
        return None
    return scanner.take() if scanner.is_done and not text[end:].strip() else None
