"""The events of a stream: text goes out between bytes that were built once, the rest as a small object.

Deltas are TextDelta or ChatDelta; both tell their `text`, tokens, logprobs and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson

from llmd.api.v1 import sse_event
from llmd_plugins.openai.logprobs import LogprobFormat

if TYPE_CHECKING:
    from llmd.api.v1 import WireError
    from llmd_plugins.openai.call import Call

_dumps = orjson.dumps


class Frames:
    """What both kinds of stream share. Subclasses say how a choice looks."""

    OBJECT = ""
    TEXT_HEAD = b""  # between the index of a choice and its text
    TEXT_TAIL = b""

    def __init__(self, call: Call, format_logprobs: LogprobFormat | None) -> None:
        body, options = call.body, call.body.stream_options
        self.call, self.logprobs = call, format_logprobs
        self.wants_usage = bool(options and options.include_usage)
        self.wants_usage_always = bool(options and options.continuous_usage_stats)
        self.wants_token_ids = bool(body.return_token_ids)
        self.is_plain = not (format_logprobs or self.wants_token_ids or self.wants_usage_always)
        self.num_choices = call.num_choices
        self.has_started = [False] * (self.num_choices * len(call.streams))
        envelope = {"id": call.id, "object": self.OBJECT, "created": call.created, "model": call.model}
        self._envelope = _dumps(envelope)[:-1] + b',"choices":['
        self._close = b'],"usage":null}' if self.wants_usage else b"]}"
        start = b"data: " + self._envelope + b'{"index":'
        self._heads = [start + str(index).encode() + self.TEXT_HEAD for index in range(len(self.has_started))]
        self._tail = self.TEXT_TAIL + self._close + b"\n\n"

    def plain(self, prompt_index: int, delta: Any) -> bytes | None:
        """The event of a delta that has nothing but text and is not the first nor the last, else None: the usual case."""
        index = prompt_index * self.num_choices + delta.index
        if not delta.text or delta.finish_reason is not None or not self.is_plain or not self.has_started[index]:
            return None
        return self._heads[index] + _dumps(delta.text) + self._tail

    def chunk(self, prompt_index: int, deltas: Sequence[Any]) -> bytes:
        """The events for the deltas of one prompt; empty where there is nothing to tell."""
        first = prompt_index * self.num_choices
        parts = []
        for delta in deltas:
            if (piece := self.plain(prompt_index, delta)) is not None:
                parts.append(piece)
            elif self._has_news(delta):
                parts.append(self._full(first + delta.index, prompt_index, delta))
        return b"".join(parts)

    def _has_news(self, delta: Any) -> bool:
        has_tokens = bool(delta.token_ids) and not self.is_plain
        return bool(delta.text) or has_tokens or delta.finish_reason is not None

    def _full(self, index: int, prompt_index: int, delta: Any) -> bytes:
        """One event of the general form."""
        is_first, self.has_started[index] = not self.has_started[index], True
        choice = self.choice(index, prompt_index, delta, is_first)
        extra = self.extra(prompt_index, is_first)
        close = self._close
        if self.wants_usage_always:
            extra = {**extra, "usage": self.usage()}
            close = b"]}"
        tail = close if not extra else close[:-1] + b"," + _dumps(extra)[1:]
        return sse_event(self._envelope + _dumps(choice) + tail)

    def end(self) -> bytes:
        """The event after the last choice: usage, where it was asked for."""
        if not self.wants_usage:
            return b""
        return sse_event(self._envelope + b'],"usage":' + _dumps(self.usage()) + b"}")

    def error(self, answer: WireError) -> bytes:
        """The event of what ended the stream early, with the tokens that were counted until then."""
        return sse_event(answer.body()[:-1] + b',"usage":' + _dumps(self.usage()) + b"}")

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return self.call.usage()

    def choice(self, index: int, prompt_index: int, delta: Any, is_first: bool) -> dict[str, Any]:
        """The choice of one delta."""
        raise NotImplementedError

    def extra(self, prompt_index: int, is_first: bool) -> dict[str, Any]:
        """What stands beside the choices of a first event."""
        return {}


def ending(delta: Any) -> dict[str, Any]:
    """How a choice ended, or that it has not."""
    if delta.finish_reason is None:
        return {"finish_reason": None}
    return {"finish_reason": str(delta.finish_reason), "stop_reason": delta.stop_reason}
