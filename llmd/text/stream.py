"""What a reader gets of its request: text as it comes, merged while the reader is slow, bounded, closed by either side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmd.engine.request import Request
from llmd.engine.step import FinishReason, TokenLogprobs

_DELTA_BYTES = 200  # of the object itself
_TOKEN_BYTES = 16
_LOGPROB_BYTES = 150  # of the tuple and its lists, without the top ones
_TOP_LOGPROB_BYTES = 48


@dataclass(slots=True)
class TextDelta:
    """News of one sequence. The last one of a sequence has its finish_reason; there is exactly one such.

    A token comes with the first text that is complete with it or after it: text that waits (half a character, what may
    become a stop string) keeps its tokens and logprobs waiting while nothing else is to be shown, and a delta with text
    holds all tokens since the one before. `text_offsets` say where in the sequence's text each of the tokens begins;
    they are there with logprobs.
    """

    request_id: str
    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: Any = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it; None for EOS
    error: str | None = None
    num_cached_tokens: int = 0
    text_offsets: list[int] | None = None

    def num_bytes(self) -> int:
        """About how much memory it holds."""
        rows = [*(self.logprobs or ()), *(self.prompt_logprobs or ())]
        num_tops = sum(len(row.top_ids) for row in rows)
        num_logprob_bytes = _LOGPROB_BYTES * len(rows) + _TOP_LOGPROB_BYTES * num_tops
        return _DELTA_BYTES + len(self.text) + _TOKEN_BYTES * len(self.token_ids) + num_logprob_bytes


class Progress(Protocol):
    """How far the engine is with a sequence; steps are known when it has ended."""

    request: Request
    num_preemptions: int
    num_steps: int
    first_scheduled_s: float | None

    @property
    def num_output_tokens(self) -> int: ...

    @property
    def is_finished(self) -> bool: ...


def merge(deltas: Sequence[TextDelta]) -> list[TextDelta]:
    """One delta for each sequence, in the order in which they first appear."""
    groups: dict[int, list[TextDelta]] = {}
    for delta in deltas:
        groups.setdefault(delta.index, []).append(delta)
    return [group[0] if len(group) == 1 else _merged(group) for group in groups.values()]


def _merged(group: list[TextDelta]) -> TextDelta:
    last = group[-1]
    return TextDelta(
        last.request_id,
        last.index,
        "".join([delta.text for delta in group]),
        [token_id for delta in group for token_id in delta.token_ids],
        _joined([delta.logprobs for delta in group]),
        _joined([delta.prompt_logprobs for delta in group]),
        next((delta.pooled for delta in group if delta.pooled is not None), None),
        last.finish_reason,
        last.stop_reason,
        last.error,
        max(delta.num_cached_tokens for delta in group),
        _joined([delta.text_offsets for delta in group]),
    )


def _joined(lists: list[list[Any] | None]) -> list[Any] | None:
    given = [items for items in lists if items is not None]
    return [item for items in given for item in items] if given else None


class RequestStream:
    """One reader's view of one request: iterate over lists of TextDelta, or `collect` all; always `close`.

    Times are on the monotonic clock. `error` is what ended the whole request, where something did.
    """

    def __init__(self, request: Request, on_close: Callable[[RequestStream], None], max_buffer_bytes: int) -> None:
        self.request = request
        self.queued_s: float | None = None  # when it left the waiting queue
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.sequences: Sequence[Progress] = ()  # the engine's own, to look at
        self.settle: Callable[[RequestStream], None] | None = None  # called once, when it is closed
        self.error: BaseException | None = None
        self.is_closed = False
        self.is_too_slow = False  # more waits for the reader than may
        self._on_close = on_close
        self._max_buffer_bytes = max_buffer_bytes
        self._buffer: list[TextDelta] = []
        self._num_bytes = 0  # of the buffer without its first delta
        self._num_unfinished = request.num_sequences
        self._waiter: asyncio.Future[None] | None = None
        self._is_collecting = False
        self._listener: Callable[[], None] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has its final delta, read or not."""
        return self._num_unfinished == 0

    def put(self, delta: TextDelta) -> None:
        """Hand a delta to the reader (loop thread; the output processor only)."""
        buffer = self._buffer
        if buffer and not self._is_collecting:
            self._num_bytes += delta.num_bytes()
            self.is_too_slow = self._num_bytes > self._max_buffer_bytes
        buffer.append(delta)
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
            if not self._num_unfinished:
                self.finished_s = time.monotonic()
        if self._listener is not None:
            self._listener()
            return
        waiter = self._waiter
        if waiter is not None and (not self._is_collecting or not self._num_unfinished) and not waiter.done():
            waiter.set_result(None)

    def close(self) -> None:
        """No more is wanted: a request that still runs is aborted. May be called again."""
        if not self.is_closed:
            self.is_closed = True
            self._buffer = []
            self._on_close(self)
            if self.settle is not None:
                self.settle(self)
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call `listener` whenever there is news to `take`, which spares a task's wake-up for each piece.

        It runs inside `put` and must not raise; None ends it.
        """
        self._listener = listener

    def take(self) -> list[TextDelta]:
        """What came since the last time, merged; empty where nothing did."""
        buffer, self._buffer = self._buffer, []
        self._num_bytes = 0
        return merge(buffer) if len(buffer) > 1 else buffer

    async def collect(self) -> list[TextDelta]:
        """Wait for the end; one delta with everything for each sequence, by index."""
        self._is_collecting = True
        parts = [delta async for deltas in self for delta in deltas]
        return sorted(merge(parts), key=lambda delta: delta.index)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[TextDelta]:
        while not self._buffer:
            if self.is_closed or self.is_finished:
                raise StopAsyncIteration
            await self._wait()
        return self.take()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
