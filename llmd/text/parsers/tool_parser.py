"""What tool parsers share: where calls begin, what comes between them, how a call is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from llmd.text.parsers.deltas import ToolCallDelta, new_call_id
from llmd.text.parsers.reader import ParserSteps, TextParser
from llmd.text.parsers.scanners import JsonScanner, NotACall
from llmd.text.parsers.schemas import ToolSchemas

MAX_NAME = 256  # characters between the beginning of a call and the end of its head

_NAME = re.compile(r"[^\s{}\[\]()<>\"'`,;]+")


def decoded(text: str) -> str:
    """The string that a JSON string means; what cannot be encoded is a question mark."""
    string: str = json.loads(text)
    return string.encode(errors="replace").decode()


class ToolParser(TextParser):
    """Finds what begins with one of OPENS; several calls may follow each other before what ends them.

    A subclass reads the first call (`_first`), those that follow (`_next`), and the end (`_close`); each raises NotACall
    for what is none. White space in front of calls, between and behind them belongs to the format.
    """

    needs_special_tokens = True  # in some models the tags are

    OPENS: tuple[str, ...] = ()  # one that ends with a bracket leaves it unread
    CLOSES: tuple[str, ...] = ()  # the last one ends them all
    STARTS: tuple[str, ...] = ()  # what else may begin a call, at the very start of the answer only; left unread

    def __init__(self, tools: Sequence[Any] | None = None, *, make_id: Callable[[], str] = new_call_id) -> None:
        self._schemas = ToolSchemas(tools)
        self._make_id = make_id
        self._num_calls = 0
        self._is_open = False  # calls were read, the end that belongs to them was not
        super().__init__()

    def _steps(self) -> ParserSteps[None]:
        if self.STARTS and (char := (yield from self._skip_space(self._say))) and char in self.STARTS:
            yield from self._calls("")
        while (tag := (yield from self._until(self.OPENS + (self.CLOSES if self._is_open else ()), self._say))) is not None:
            if self._is_open and tag in self.CLOSES:
                self._is_open = tag != self.CLOSES[-1]
            else:
                yield from self._calls(tag)
        self._end_content()

    def _end_content(self) -> None:
        """The text ended; white space behind the last call is dropped."""
        if self._num_calls:
            self._space.take()
        self._say_rest()

    def _calls(self, tag: str) -> ParserSteps[None]:
        if tag.endswith(("{", "[")):
            self._unread()
            tag = tag[:-1]
        if not (yield from self._attempt(tag, self._first(tag))):
            return
        self._is_open = bool(self.CLOSES)
        while (yield from self._attempt("", self._next())):
            self._is_open = bool(self.CLOSES)
        yield from self._attempt("", self._close())

    def _first(self, tag: str) -> ParserSteps[None]:
        raise NotImplementedError

    def _next(self) -> ParserSteps[None]:
        yield from ()
        raise NotACall

    def _close(self) -> ParserSteps[None]:
        yield from self._skip_space()
        tag = yield from self._accept_any(self.CLOSES)
        if tag is None:
            raise NotACall
        self._is_open = tag != self.CLOSES[-1]

    # --- telling a call

    def _check_name(self, name: str) -> str:
        """The name of a function that may be called."""
        if not _NAME.fullmatch(name) or not self._schemas.knows(name):
            raise NotACall
        return name

    def _begin_call(self, name: str, call_id: str | None = None) -> None:
        """From here on it is a call: what was held is not given up any more."""
        self._drop()
        self._space.take()
        self._num_calls += 1
        self._emit(self._num_calls - 1, ToolCallDelta(self._num_calls - 1, call_id or self._make_id(), name))

    def _argue(self, text: str) -> None:
        """A piece of the arguments of the call begun last."""
        self._emit(self._num_calls - 1, text)

    def _arguments(self, scanner: JsonScanner | None = None) -> ParserSteps[None]:
        """Read the arguments of a call that has begun. If they break, the rest up to the end of the calls goes with them."""
        try:
            yield from self._value(scanner or JsonScanner(), self._argue)
        except NotACall:
            yield from self._broken_arguments()

    def _broken_arguments(self) -> ParserSteps[None]:
        if not self.CLOSES:
            yield from self._to_end(self._argue)
        elif (tag := (yield from self._until(self.CLOSES, self._argue))) is not None:
            self._is_open = tag != self.CLOSES[-1]
        raise NotACall

    def _string(self) -> ParserSteps[str]:
        """Read a JSON string."""
        if (yield from self._skip_space()) != '"':
            raise NotACall
        pieces: list[str] = []
        yield from self._value(JsonScanner(), pieces.append)
        return decoded("".join(pieces))

    def _head(self, tags: tuple[str, ...], max_chars: int = MAX_NAME) -> ParserSteps[tuple[str, str]]:
        """The text before the first of the tags, and the tag; one that ends with a brace leaves it unread."""
        text, tag = yield from self._up_to(tags, max_chars)
        if tag.endswith("{"):
            self._unread()
        return text, tag
