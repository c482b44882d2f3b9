"""Parsers as plain descents: a generator that reads its text as if all of it were there and yields where it is not yet.

feed ──► [read …│ not read yet]      The steps take text from the front, character by character the same however it was
                ▲ _at                cut. What may still turn out to be no call is held: given up, it comes out as
                                     content and reading goes on right where it failed, so no character is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

from llmd.text.parsers.deltas import ParsedDelta, ToolCallDelta
from llmd.text.parsers.scanners import BrokenValue, JsonScanner, NotACall
from llmd.text.parsers.tags import tags_of

MAX_HELD = 1 << 18  # characters that wait for the name of their function; more than these are no call
MAX_SPACE = 256  # of white space in front of a call or tag

T = TypeVar("T")
ParserSteps = Generator[None, None, T]
Put = Callable[[str], None]


class TrailingSpace:
    """Keeps back the white space a text ends with, for a tag may follow that makes it part of the format."""

    __slots__ = ("_chars", "_held")

    def __init__(self, chars: str | None = None) -> None:
        self._chars, self._held = chars, ""

    def push(self, text: str) -> str:
        """Add text; returns what is certain."""
        text = self._held + text
        num_certain = max(len(text.rstrip(self._chars)), len(text) - MAX_SPACE)
        self._held = text[num_certain:]
        return text[:num_certain]

    def take(self) -> str:
        """What is kept back, no longer."""
        held, self._held = self._held, ""
        return held


def _joined(kind: str | int, pieces: list[str | ToolCallDelta]) -> ParsedDelta:
    """Neighbours of one kind as one."""
    text = "".join([piece for piece in pieces if isinstance(piece, str)])
    if isinstance(kind, int):
        begun = pieces[0] if isinstance(pieces[0], ToolCallDelta) else ToolCallDelta(kind)
        return ParsedDelta("", "", ToolCallDelta(kind, begun.id, begun.name, text))
    return ParsedDelta("", text) if kind == "reasoning" else ParsedDelta(text)


class TextParser:
    """A parser whose subclass writes `_steps`. They run until the text has ended, whatever it says."""

    needs_special_tokens = False
    splits_reasoning = False

    def __init__(self) -> None:
        self._text, self._at, self._is_last = "", 0, False
        self._held: list[str] | None = None
        self._room = 0  # characters that may yet be held
        self._out: list[tuple[str | int, str | ToolCallDelta]] = []  # by "content", "reasoning", or a call's index
        self._space = TrailingSpace()
        self._run = self._steps()

    def feed(self, text: str, token_ids: Sequence[int] = ()) -> list[ParsedDelta]:
        """Take in new text."""
        self._text, self._at = self._text[self._at :] + text, 0
        next(self._run, None)
        return self._take()

    def finish(self) -> list[ParsedDelta]:
        """The text ended."""
        self._is_last = True
        next(self._run, None)
        return self._take()

    def _steps(self) -> ParserSteps[None]:
        raise NotImplementedError

    # --- what comes out

    def _take(self) -> list[ParsedDelta]:
        out = self._out
        if not out:
            return []
        if len(out) == 1:
            deltas = [_joined(out[0][0], [out[0][1]])]
        else:
            deltas = [_joined(kind, [piece for _, piece in group]) for kind, group in groupby(out, key=itemgetter(0))]
        out.clear()
        return deltas

    def _emit(self, kind: str | int, piece: str | ToolCallDelta) -> None:
        if piece:
            self._out.append((kind, piece))

    def _say(self, text: str) -> None:
        """Content; the white space at its end waits."""
        self._emit("content", self._space.push(text))

    def _say_rest(self) -> None:
        self._emit("content", self._space.take())

    # --- holding back

    def _hold(self, text: str = "") -> None:
        """From here on (and what was read as `text` just before) the text may be given up."""
        self._held, self._room = [text], MAX_HELD

    def _drop(self) -> None:
        """What was held is part of the format."""
        self._held = None

    def _give_up(self) -> None:
        """What was held is content after all."""
        if self._held is not None:
            self._say("".join(self._held))
        self._held = None

    def _attempt(self, tag: str, steps: ParserSteps[None]) -> ParserSteps[bool]:
        """Run steps that read what `tag` begins; whether it was that. If not, it is content up to where they stopped."""
        self._hold(tag)
        try:
            yield from steps
        except NotACall:
            self._give_up()
            return False
        self._drop()
        return True

    # --- reading

    def _end(self) -> int:
        return len(self._text) if self._held is None else min(len(self._text), self._at + self._room)

    def _read(self, end: int) -> str:
        text, self._at = self._text[self._at : end], end
        if self._held is not None:
            self._held.append(text)
            self._room -= len(text)
        return text

    def _unread(self, num_chars: int = 1) -> None:
        """Put back the end of what was just read (a tag, or its last character)."""
        self._at -= num_chars
        if self._held is not None:
            self._held[-1] = self._held[-1][:-num_chars]
            self._room += num_chars

    def _wait(self) -> ParserSteps[bool]:
        """Wait for more text; False when the text has ended. Raises NotACall when too much is held already."""
        if self._held is not None and len(self._text) - self._at >= self._room:
            raise NotACall
        if self._is_last:
            return False
        yield
        return True

    def _until(self, tags: tuple[str, ...], put: Put) -> ParserSteps[str | None]:
        """Read up to the first of the tags and over it; the text before goes to `put`. None: the text ended."""
        find = tags_of(tags).find
        while True:
            end = self._end()
            found = find(self._text, self._at, end, is_last=self._is_last and self._held is None)
            if found.end > self._at:
                put(self._read(found.end))
            if found.tag is not None:
                self._read(self._at + len(found.tag))
                return found.tag
            if not (yield from self._wait()):
                if self._at < end:
                    put(self._read(end))
                return None

    def _to_end(self, put: Put) -> ParserSteps[None]:
        """Read all that comes."""
        while True:
            if self._at < self._end():
                put(self._read(self._end()))
            if not (yield from self._wait()):
                return

    def _peek(self) -> ParserSteps[str]:
        """The next character, left unread; an empty string at the end."""
        while self._at >= self._end():
            if not (yield from self._wait()):
                return ""
        return self._text[self._at]

    def _skip_space(self, put: Put | None = None) -> ParserSteps[str]:
        """Read white space; the character behind it, left unread."""
        while (char := (yield from self._peek())) and char.isspace():
            end = self._at + 1
            while end < self._end() and self._text[end].isspace():
                end += 1
            space = self._read(end)
            if put is not None:
                put(space)
        return char

    def _accept(self, literal: str) -> ParserSteps[bool]:
        """Read a literal if it stands here."""
        while True:
            here = self._text[self._at : min(self._end(), self._at + len(literal))]
            if here == literal:
                self._read(self._at + len(literal))
                return True
            if not literal.startswith(here) or not (yield from self._wait()):
                return False

    def _accept_any(self, literals: Sequence[str]) -> ParserSteps[str | None]:
        """Read one of some literals, none of which begins another."""
        for literal in literals:
            if (yield from self._accept(literal)):
                return literal
        return None

    def _expect(self, literal: str) -> ParserSteps[None]:
        if not (yield from self._accept(literal)):
            raise NotACall

    def _up_to(self, tags: tuple[str, ...], max_chars: int) -> ParserSteps[tuple[str, str]]:
        """The text before the first of the tags, and the tag. Raises NotACall without one within so many characters."""
        pieces: list[str] = []
        room = self._room
        self._room = min(room, max_chars)
        before = self._room
        try:
            tag = yield from self._until(tags, pieces.append)
        finally:
            self._room = room - (before - self._room)
        if tag is None:
            raise NotACall
        return "".join(pieces), tag

    def _value(self, scanner: JsonScanner, put: Put) -> ParserSteps[None]:
        """Read one value; its JSON text goes to `put`. Raises BrokenValue, or NotACall where the text ends in it."""
        while not scanner.is_done:
            try:
                end = scanner.feed(self._text, self._at, self._end(), is_last=self._is_last and self._held is None)
            except BrokenValue as error:
                self._read(error.at)
                put(scanner.take())
                raise
            self._read(end)
            put(scanner.take())
            if not scanner.is_done and not (yield from self._wait()):
                raise NotACall
