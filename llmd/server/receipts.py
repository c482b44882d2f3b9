"""What is known of the requests that are served now, and of the last ones that ended: for `llmd top` and `llmd explain`."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmd.plugin.specs import RequestSummary
    from llmd.server.middleware import Receipt


class RequestLog:
    """Live receipts, and a bounded number of ended ones by request id: an id used again shows the latest. Loop only."""

    def __init__(self, max_ended: int) -> None:
        self.max_ended = max_ended
        self._live: dict[int, Receipt] = {}
        self._ended: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def open(self, receipt: Receipt) -> None:
        """A request came."""
        self._live[id(receipt)] = receipt

    def close(self, receipt: Receipt) -> None:
        """A request ended."""
        self._live.pop(id(receipt), None)

    def keep(self, summary: RequestSummary) -> None:
        """Remember an ended request; a probe that went well is not worth it."""
        if not self.max_ended or (not summary.model and summary.status < 400):
            return
        self._ended.pop(summary.request_id, None)
        self._ended[summary.request_id] = summary.fields()
        while len(self._ended) > self.max_ended:
            self._ended.popitem(last=False)

    def live(self) -> list[Receipt]:
        """The requests that have reached an engine, oldest first."""
        return [receipt for receipt in self._live.values() if receipt.streams]

    def find(self, request_id: str) -> list[Receipt]:
        """The live requests of that id; clients may use one id twice at a time."""
        for name in names_of(request_id):
            if found := [receipt for receipt in self._live.values() if receipt.request_id == name]:
                return found
        return []

    def ended(self, request_id: str) -> dict[str, Any] | None:
        """The receipt of an ended request, if it is still known."""
        return next((self._ended[name] for name in names_of(request_id) if name in self._ended), None)

    def recent(self, limit: int) -> list[dict[str, Any]]:
        """The last ended requests, the latest first."""
        return [self._ended[name] for name, _ in zip(reversed(self._ended), range(limit), strict=False)]


def names_of(given: str) -> Iterator[str]:
    """The request ids that a client may mean: the id itself, or the one inside of an answer's id (`chatcmpl-<id>`)."""
    yield given
    if inner := given.partition("-")[2]:
        yield inner
    if inner := given.partition("_")[2]:
        yield inner
        yield inner.rpartition("-")[0] or inner  # `msg_<id>-7f01`


def live_row(receipt: Receipt) -> dict[str, Any]:
    """A request that is being served, as the admin routes show it."""
    streams = receipt.streams
    sequences = [sequence for stream in streams for sequence in stream.sequences]
    return {
        "request_id": receipt.request_id,
        "route": receipt.route,
        "model": receipt.model,
        "adapter": adapter_of(receipt),
        "key": receipt.key,
        "phase": phase_of(receipt),
        "age_s": round(time.monotonic() - receipt.started_s, 3),
        "sequences": len(sequences),
        "prompt_tokens": sum(len(stream.request.prompt) for stream in streams),
        "cached_tokens": sum(stream.num_cached_tokens for stream in streams),
        "output_tokens": sum(stream.num_output_tokens for stream in streams),
        "preemptions": sum(sequence.num_preemptions for sequence in sequences),
    }


def adapter_of(receipt: Receipt) -> str:
    """The adapter that a request asked for, or ""."""
    return next((stream.request.adapter for stream in receipt.streams if stream.request.adapter), "")


def phase_of(receipt: Receipt) -> str:
    """Where a request is on its road: reading, queue, prefill, decode, ending."""
    if not receipt.streams:
        return "reading"
    sequences = [sequence for stream in receipt.streams for sequence in stream.sequences]
    if sequences and all(sequence.is_finished for sequence in sequences):
        return "ending"
    if any(stream.first_token_s is not None for stream in receipt.streams):
        return "decode"
    return "prefill" if any(sequence.first_scheduled_s is not None for sequence in sequences) else "queue"
