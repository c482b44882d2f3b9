"""Stop strings across increments: finds the match that is complete first, holds back only what may still become one.

For every stop string a Knuth-Morris-Pratt state says how much of it the text ends with, so a character costs the same
however long the strings are. Where several strings are complete at one character the first in the list is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopFeed(NamedTuple):
    """Text that may be shown, and the stop string that ended it."""

    text: str
    stop: str | None


class _Matcher:
    """How much of one stop string the text ends with."""

    __slots__ = ("_borders", "length", "stop")

    def __init__(self, stop: str) -> None:
        self.stop, self.length = stop, 0
        self._borders = [0]  # as far as text has matched so far: long strings cost nothing before that

    def feed(self, text: str, can_match: bool) -> int | None:
        """Take in `text`; the position in it right behind the first match, None without one."""
        stop, length, position = self.stop, self.length, 0
        while position < len(text):
            if not length:
                position = text.find(stop[0], position)
                if position < 0:
                    break
            while length and text[position] != stop[length]:
                length = self._border(length)
            length += text[position] == stop[length]
            position += 1
            if length == len(stop):
                length = self._border(length)
                if can_match:
                    self.length = length
                    return position
        self.length = length
        return None

    def _border(self, length: int) -> int:
        """Of the prefix of that length, the longest proper prefix that is also its suffix."""
        stop, borders = self.stop, self._borders
        while len(borders) < length:
            end, border = len(borders), borders[-1]
            while border and stop[end] != stop[border]:
                border = borders[border - 1]
            borders.append(border + (stop[end] == stop[border]))
        return borders[length - 1]


class StopChecker:
    """The stop strings of one sequence. With `include` the stop string stays in the text and nothing is held back."""

    __slots__ = ("_first_characters", "_held", "_include", "_is_idle", "_matchers")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._include = include
        self._is_idle = True  # the text ends with no part of a stop string
        self._held = ""

    def feed(self, text: str, can_match: bool = True) -> StopFeed:
        """Take in new text. Matches that end in it count only when `can_match` (min_tokens are out)."""
        if self._is_idle and self._first_characters.isdisjoint(text):
            return StopFeed(text, None)
        best_end, best = len(text) + 1, None
        for matcher in self._matchers:
            end = matcher.feed(text, can_match)
            if end is not None and end < best_end:
                best_end, best = end, matcher.stop
        if best is not None:
            return self._cut(text, best_end, best)
        num_open = max([matcher.length for matcher in self._matchers])
        self._is_idle = not num_open
        if self._include:
            return StopFeed(text, None)
        text = self._held + text
        num_shown = len(text) - num_open
        self._held = text[num_shown:]
        return StopFeed(text[:num_shown], None)

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _cut(self, text: str, end: int, stop: str) -> StopFeed:
        if self._include:
            return StopFeed(text[:end], stop)
        text, end = self._held + text, len(self._held) + end
        self._held = ""
        return StopFeed(text[: end - len(stop)], stop)
