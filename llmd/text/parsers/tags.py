"""Finds the first of several fixed strings in a text that comes piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple


class Found(NamedTuple):
    """`end`: up to here no tag begins. `tag`: the one that stands right there, None when it is not (yet) certain."""

    end: int
    tag: str | None


class Tags:
    """Some fixed strings, none of which begins another."""

    __slots__ = ("_first", "_max_len", "_pattern", "_tags")

    def __init__(self, tags: Iterable[str]) -> None:
        self._tags = tuple(tags)
        self._first = re.compile("[" + re.escape("".join({tag[0] for tag in self._tags})) + "]")
        self._max_len = max(map(len, self._tags))
        self._pattern = re.compile("|".join(map(re.escape, self._tags)))

    def find(self, text: str, at: int, end: int, *, is_last: bool) -> Found:
        """Look into text[at:end]; what may yet become a tag is held back unless `is_last`."""
        match = self._pattern.search(text, at, end)
        held = end if is_last else self._unfinished(text, at, end)
        if match is not None and match.start() <= held:
            return Found(match.start(), match.group())
        return Found(held, None)

    def _unfinished(self, text: str, at: int, end: int) -> int:
        """Where the text's end begins to look like a tag."""
        for match in self._first.finditer(text, max(at, end - self._max_len + 1), end):
            tail = text[match.start() : end]
            if any(len(tail) < len(tag) and tag.startswith(tail) for tag in self._tags):
                return match.start()
        return end


@lru_cache(maxsize=256)
def tags_of(tags: tuple[str, ...]) -> Tags:
    """The same object for the same strings."""
    return Tags(tags)
