"""Where each key of a TOML text stands. tomllib tells values but no lines; this scanner tells lines but no values.

It reads only texts that tomllib has accepted, so that it need not look for mistakes.
"""

from __future__ import annotations

import re

from llmd.config import Path

_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_INLINE_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'',
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]*")
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b"}


def key_lines(text: str) -> dict[Path, int]:
    """Each key and table of a valid TOML text → the line (from 1) where it is first set."""
    return _Scanner(text).scan()


def _unescape(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    return chr(int(code, 16)) if code else _ESCAPED.get(match[3], match[3])


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines: dict[Path, int] = {}
        self._num_elements: dict[Path, int] = {}  # arrays of tables → elements so far

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        self._skip(_SPACE)
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_SPACE)
        return self._lines

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        taken = match[0] if match else ""
        self._at += len(taken)
        return taken

    def _mark(self, path: Path) -> None:
        self._lines.setdefault(path, self._text.count("\n", 0, self._at) + 1)

    def _header(self) -> Path:
        """[a.b] or [[a.b]]: the path of the table that follows."""
        is_array = self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        start, keys = self._at, self._keys()
        path = (*self._resolve(keys[:-1]), keys[-1])
        if is_array:
            index = self._num_elements[path] = self._num_elements.get(path, -1) + 1
            self._mark_at(start, path)
            path = (*path, index)
        elif path in self._num_elements:
            path = (*path, self._num_elements[path])
        self._mark_at(start, path)
        self._at += 2 if is_array else 1
        return path

    def _mark_at(self, at: int, path: Path) -> None:
        here, self._at = self._at, at
        self._mark(path)
        self._at = here

    def _resolve(self, keys: list[str]) -> Path:
        """A header's leading keys name the last element of an array of tables."""
        path: Path = ()
        for key in keys:
            path = (*path, key)
            if path in self._num_elements:
                path = (*path, self._num_elements[path])
        return path

    def _keys(self) -> list[str]:
        keys = []
        while True:
            self._skip(_INLINE_SPACE)
            keys.append(self._key())
            self._skip(_INLINE_SPACE)
            if self._text[self._at : self._at + 1] != ".":
                return keys
            self._at += 1

    def _key(self) -> str:
        quote = self._text[self._at]
        if quote not in "\"'":
            return self._skip(_BARE_KEY)
        inner = self._skip(_STRING)[1:-1]
        return _ESCAPE.sub(_unescape, inner) if quote == '"' else inner

    def _pair(self, table: Path) -> None:
        start = self._at
        path = table
        for key in self._keys():
            path = (*path, key)
            self._mark_at(start, path)
        self._at += 1  # =
        self._skip(_INLINE_SPACE)
        self._value(path)

    def _value(self, path: Path) -> None:
        opening = self._text[self._at : self._at + 1]
        if opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        elif opening and opening in "\"'":
            self._skip(_STRING)
        else:
            self._skip(_SCALAR)

    def _array(self, path: Path) -> None:
        self._at += 1
        index = 0
        while self._more("]"):
            self._mark((*path, index))
            self._value((*path, index))
            index += 1
        self._at += 1

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        while self._more("}"):
            self._pair(path)
        self._at += 1

    def _more(self, closing: str) -> bool:
        """Whether another element follows; a comma before it is passed over."""
        self._skip(_SPACE)
        if self._text[self._at] == ",":
            self._at += 1
            self._skip(_SPACE)
        return self._text[self._at] != closing
