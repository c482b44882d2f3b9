"""Events of a response in the background: written once, read by whoever asks, from any event on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from itertools import islice

from llmd.api.v1 import InvalidRequest


class Feed:
    """Loop thread only. The event of sequence number n is the n-th added; the oldest go where `max_bytes` are exceeded."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._frames: deque[bytes] = deque()
        self._first = 0  # sequence number of the oldest that is kept
        self._news = asyncio.Event()
        self._is_closed = False
        self.num_bytes = 0

    def add(self, frames: Sequence[bytes]) -> None:
        """The next events."""
        self._frames.extend(frames)
        self.num_bytes += sum(map(len, frames))
        while self.num_bytes > self._max_bytes and len(self._frames) > 1:
            self.num_bytes -= len(self._frames.popleft())
            self._first += 1
        self._wake()

    def close(self) -> None:
        """No more will come."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def check(self, after: int) -> None:
        """Raise InvalidRequest where events behind `after` are not kept any more."""
        if after + 1 < self._first:
            message = f"starting_after must be at least {self._first - 1}: earlier events are not kept any more, got {after}"
            raise InvalidRequest(message, param="starting_after", code="invalid_value")

    async def follow(self, after: int) -> AsyncIterator[bytes]:
        """The events behind `after`, those that are there at once, until the last. Raises what `check` raises."""
        place = after + 1
        while True:
            self.check(place - 1)
            news = self._news
            if frames := list(islice(self._frames, max(0, place - self._first), None)):
                place += len(frames)
                yield b"".join(frames)
            elif self._is_closed:
                return
            else:
                await news.wait()
