"""Deltas of the engine into text for the streams, once a step for all sequences."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from llmd.engine.params import SamplingParams
from llmd.engine.request import Request
from llmd.engine.step import FinishReason, SequenceDelta, TokenLogprobs
from llmd.errors import InvalidRequest
from llmd.text.detokenizer import Detokenizer
from llmd.text.stop import StopChecker
from llmd.text.stream import RequestStream, TextDelta
from llmd.text.tokenizer import Tokenizer

__all__ = ["Ender", "OutputProcessor", "SequenceText", "TextDelta"]

logger = logging.getLogger(__name__)

_NO_PARAMS = SamplingParams(detokenize=False)


class Ender(Protocol):
    """The part of the engine that text may call."""

    def abort(self, request_id: str) -> None:
        """Nobody reads this request any more."""

    def finish(self, request_id: str, index: int, reason: FinishReason) -> None:
        """This sequence is over; no further delta for it."""


class SequenceText:
    """The text of one sequence: detokenizer, stop strings, and what waits for more text."""

    __slots__ = (
        "_detokenizer",
        "_has_each",
        "_has_offsets",
        "_hidden_ids",
        "_length",
        "_logprobs",
        "_min_tokens",
        "_num_cached_tokens",
        "_num_tokens",
        "_offsets",
        "_stops",
        "_token_ids",
        "is_finished",
        "num_dropped",
    )

    def __init__(self, detokenizer: Detokenizer | None, params: SamplingParams, eos_token_ids: Sequence[int] = ()) -> None:
        self._detokenizer = detokenizer
        is_shown = params.include_stop_str_in_output
        self._hidden_ids = () if is_shown else (*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids))
        self._stops = StopChecker(params.stop, is_shown) if params.stop and detokenizer else None
        self._min_tokens = params.min_tokens
        self._has_offsets = params.logprobs is not None and detokenizer is not None
        self._has_each = self._has_offsets or self._stops is not None  # tokens are looked at one by one
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self.num_dropped = 0  # tokens behind the stop string
        self._length = 0  # characters detokenized, shown or held
        # tokens whose text is still held, and theirs:
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._offsets: list[int] = []
        self.is_finished = False

    def take(self, delta: SequenceDelta) -> TextDelta | None:
        """The news for the reader; None while everything is held back."""
        if self._detokenizer is None:
            return self._answer(delta, "", delta.token_ids, delta.logprobs)
        if delta.finish_reason is not None:
            return self._take_last(delta, self._detokenizer)
        if self._has_each:
            return self._take_each(delta, self._detokenizer)
        text = self._detokenizer.feed(delta.token_ids)
        if text or delta.prompt_logprobs is not None:
            return self._answer(delta, text, delta.token_ids, delta.logprobs)
        self._hold(delta)
        return None

    def _take_each(self, delta: SequenceDelta, detokenizer: Detokenizer) -> TextDelta | None:
        text, num_tokens, stop = self._feed_each(delta.token_ids, detokenizer)
        if stop is not None:
            return self._stopped(delta, text, num_tokens, stop)
        if text or delta.prompt_logprobs is not None:
            return self._answer(delta, text, delta.token_ids, delta.logprobs)
        self._hold(delta)
        return None

    def _take_last(self, delta: SequenceDelta, detokenizer: Detokenizer) -> TextDelta:
        """The end: the token that stopped the sequence is not shown (unless asked), what was held is."""
        token_ids = delta.token_ids
        is_hidden = bool(token_ids) and token_ids[-1] in self._hidden_ids and delta.finish_reason is FinishReason.STOP
        text, num_tokens, stop = self._feed_each(token_ids[:-1] if is_hidden else token_ids, detokenizer)
        if stop is not None:
            return self._stopped(delta, text, num_tokens, stop)
        if self._has_offsets and is_hidden:
            self._offsets.append(self._length)
        rest = detokenizer.finish()
        if self._stops is not None:
            shown, stop = self._stops.feed(rest, self._num_tokens > self._min_tokens)
            text += shown
            rest = self._stops.finish() if stop is None else ""
        return self._answer(delta, text + rest, token_ids, delta.logprobs)

    def _feed_each(self, token_ids: Sequence[int], detokenizer: Detokenizer) -> tuple[str, int, str | None]:
        """Text that may be shown, how many of the tokens are taken, and the stop string that was found."""
        if not self._has_each:
            return detokenizer.feed(token_ids), len(token_ids), None
        shown = []
        for index in range(len(token_ids)):
            if self._has_offsets:
                self._offsets.append(self._length)
            text = detokenizer.feed(token_ids[index : index + 1])
            self._length += len(text)
            self._num_tokens += 1
            stop = None
            if self._stops is not None:
                text, stop = self._stops.feed(text, self._num_tokens > self._min_tokens)
            shown.append(text)
            if stop is not None:
                return "".join(shown), index + 1, stop
        return "".join(shown), len(token_ids), None

    def _hold(self, delta: SequenceDelta) -> None:
        self._token_ids.extend(delta.token_ids)
        self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        if delta.logprobs:
            self._logprobs.extend(delta.logprobs)

    def _stopped(self, delta: SequenceDelta, text: str, num_tokens: int, stop: str) -> TextDelta:
        logprobs = delta.logprobs[:num_tokens] if delta.logprobs is not None else None
        answer = self._answer(delta, text, delta.token_ids[:num_tokens], logprobs)
        answer.finish_reason, answer.stop_reason, answer.error = FinishReason.STOP, stop, None
        self.num_dropped = len(delta.token_ids) - num_tokens
        self.is_finished = True
        return answer

    def _answer(
        self, delta: SequenceDelta, text: str, token_ids: Sequence[int], logprobs: list[TokenLogprobs] | None
    ) -> TextDelta:
        offsets = None
        if self._token_ids:
            token_ids, self._token_ids = [*self._token_ids, *token_ids], []
            if self._logprobs:
                logprobs, self._logprobs = [*self._logprobs, *(logprobs or ())], []
        if self._offsets:
            offsets, self._offsets = self._offsets, []
        finish_reason = delta.finish_reason
        if finish_reason is not None:
            self.is_finished = True
        return TextDelta(
            delta.request_id,
            delta.index,
            text,
            token_ids,
            logprobs,
            delta.prompt_logprobs,
            delta.pooled,
            finish_reason,
            delta.stop_token_id,
            delta.error,
            delta.num_cached_tokens or self._num_cached_tokens,
            offsets,
        )


class OutputProcessor:
    """All open requests of one engine. Loop thread only."""

    def __init__(self, tokenizer: Tokenizer, *, max_buffer_bytes: int) -> None:
        self._tokenizer, self._max_buffer_bytes = tokenizer, max_buffer_bytes
        self._engine: Ender | None = None
        self._open: dict[str, tuple[RequestStream, list[SequenceText]]] = {}

    def bind(self, engine: Ender) -> None:
        """Name the engine that is told of stop strings and closed streams."""
        self._engine = engine

    @property
    def num_open(self) -> int:
        """Requests whose streams are neither finished nor closed."""
        return len(self._open)

    def open(self, request: Request) -> RequestStream:
        """A stream for a request that is about to be added to the engine. Raises InvalidRequest for an id that is taken."""
        if request.request_id in self._open:
            raise InvalidRequest(f"request id {request.request_id!r} is already running", param="request_id")
        params = request.params if isinstance(request.params, SamplingParams) else _NO_PARAMS
        stream = RequestStream(request, self._closed, self._max_buffer_bytes)
        self._open[request.request_id] = (stream, [self._sequence(request, params) for _ in range(request.num_sequences)])
        return stream

    def publish(self, deltas: Sequence[SequenceDelta]) -> None:
        """Make text of the deltas of a step and hand it to the streams: the only loop over deltas."""
        for delta in deltas:
            entry = self._open.get(delta.request_id)
            if entry is None:
                continue
            stream, sequences = entry
            sequence = sequences[delta.index]
            if sequence.is_finished:
                continue
            try:
                news = sequence.take(delta)
            except Exception:  # whatever a tokenizer's own code raises ends the one sequence it happened to
                logger.exception("the text of request %s, sequence %d failed", delta.request_id, delta.index)
                news = _failed(delta.request_id, delta.index, "the tokenizer failed on the output")
                sequence.is_finished = True
            if stream.first_token_s is None:
                self._note_first(stream, delta)
            stream.num_output_tokens += len(delta.token_ids) - sequence.num_dropped
            if news is not None:
                stream.put(news)
                if news.finish_reason is not None:
                    self._ended(stream, delta, news.finish_reason)
                elif stream.is_too_slow:
                    self._cut_off(stream)

    def fail_all(self, error: BaseException, message: str = "the engine failed") -> None:
        """End every open request with an error."""
        entries, self._open = list(self._open.values()), {}
        for stream, sequences in entries:
            stream.error = error
            for index, sequence in enumerate(sequences):
                if not sequence.is_finished:
                    sequence.is_finished = True
                    stream.put(_failed(stream.request.request_id, index, message))

    def _sequence(self, request: Request, params: SamplingParams) -> SequenceText:
        if not params.detokenize:
            return SequenceText(None, params)
        detokenizer = self._tokenizer.detokenizer(
            request.prompt.token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        return SequenceText(detokenizer, params, request.eos_token_ids)

    def _note_first(self, stream: RequestStream, delta: SequenceDelta) -> None:
        stream.num_cached_tokens = max(stream.num_cached_tokens, delta.num_cached_tokens)
        if stream.queued_s is None and delta.queue_s is not None:
            stream.queued_s = stream.request.arrival_s + delta.queue_s
        if delta.token_ids or delta.pooled is not None:
            stream.first_token_s = time.monotonic()

    def _ended(self, stream: RequestStream, delta: SequenceDelta, reason: FinishReason) -> None:
        if delta.finish_reason is None and self._engine is not None:  # the engine does not know yet
            self._engine.finish(delta.request_id, delta.index, reason)
        if stream.is_finished:
            self._open.pop(delta.request_id, None)

    def _cut_off(self, stream: RequestStream) -> None:
        """The reader does not keep up: abort the request, tell the reader when it comes back."""
        request_id = stream.request.request_id
        logger.warning("request %s: its reader is too slow, aborted", request_id)
        self.abort(request_id, f"the output was read too slowly: more than {self._max_buffer_bytes} bytes waited")

    def abort(self, request_id: str, error: str) -> None:
        """End a request and tell its reader why; one that is not open is ignored."""
        stream, sequences = self._open.pop(request_id, (None, []))
        if stream is None:
            return
        for index, sequence in enumerate(sequences):
            if not sequence.is_finished:
                sequence.is_finished = True
                stream.put(TextDelta(request_id, index, "", (), finish_reason=FinishReason.ABORT, error=error))
        if self._engine is not None:
            self._engine.abort(request_id)

    def _closed(self, stream: RequestStream) -> None:
        entry = self._open.get(stream.request.request_id)
        if entry is not None and entry[0] is stream:
            del self._open[stream.request.request_id]
            stream.finished_s = time.monotonic()
            if self._engine is not None:
                self._engine.abort(stream.request.request_id)


def _failed(request_id: str, index: int, message: str) -> TextDelta:
    return TextDelta(request_id, index, "", (), finish_reason=FinishReason.ERROR, error=message)
