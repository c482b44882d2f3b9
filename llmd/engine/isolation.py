"""A waiting queue around another: whoever is suspected of a crash runs alone until it has shown that it does no harm.

Suspects go one at a time, and take turns with the others where both wait for an idle device. One that waits too long for
that joins the others, still as the only suspect: should the process die of it, there is no doubt, and it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from llmd.engine.journal import Suspects
from llmd.engine.queue import FairQueue, Load, Share, WaitingQueue
from llmd.engine.sequence import Sequence
from llmd.engine.step import FinishReason

_PROOF_TOKENS = 16  # output tokens after which it is believed: what kills does so with the prompt or soon after
_PATIENCE_S = 30.0


class IsolatingQueue:
    """Implements WaitingQueue. While there is no suspect, it only passes calls on."""

    def __init__(self, inner: WaitingQueue, suspects: Suspects, running: Callable[[], Seq[Sequence]]) -> None:
        self._inner, self._suspects, self._running = inner, suspects, running
        self._watched: dict[str, Sequence] = {}  # by request id: suspects that wait or run, the request's last sequence
        self._joined: str | None = None  # the suspect that was let in beside others
        self._was_alone = False  # a suspect had the idle device last

    def push(self, sequence: Sequence) -> None:
        """A new one; a suspect is known from now on."""
        if self._suspects and self._suspects.crashes(sequence.request):
            self._watched[sequence.request.request_id] = sequence
        self._inner.push(sequence)

    def push_front(self, sequence: Sequence) -> None:
        """One that was preempted."""
        self._inner.push_front(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has a row, or has ended."""
        self._inner.remove(sequence)

    def __len__(self) -> int:
        return len(self._inner)

    def ordered(self, now_s: float) -> Iterator[Sequence]:
        """The order of the queue within; of suspects, one at a time and only when nothing else runs."""
        if self._watched:
            self._judge()
        return self._one_suspect(now_s) if self._watched else self._inner.ordered(now_s)

    def _judge(self) -> None:
        """Those that ended or went on for long enough are no suspects any more; who left early stays one."""
        for request_id, sequence in list(self._watched.items()):
            has_proved = sequence.num_output_tokens >= _PROOF_TOKENS
            if sequence.is_finished or has_proved:
                del self._watched[request_id]
                if has_proved or sequence.finish_reason not in (FinishReason.ABORT, FinishReason.TIMEOUT):
                    self._suspects.acquit(sequence.request)

    def _one_suspect(self, now_s: float) -> Iterator[Sequence]:
        running = {entry.request.request_id for entry in self._running()}
        waiting = list(self._inner.ordered(now_s))
        suspect = next((request_id for request_id in self._watched if request_id in running), None)
        is_alone = suspect is not None and suspect != self._joined
        if suspect is None:
            suspect, is_alone = self._choose(waiting, bool(running), now_s)
        for sequence in waiting:
            request_id = sequence.request.request_id
            if request_id == suspect or (not is_alone and request_id not in self._watched):
                yield sequence

    def _choose(self, waiting: Seq[Sequence], is_busy: bool, now_s: float) -> tuple[str | None, bool]:
        """Which suspect goes next, and whether alone."""
        suspects = [entry.request for entry in waiting if entry.request.request_id in self._watched]
        has_others = len(suspects) < len(waiting)
        if not is_busy and suspects and not (has_others and self._was_alone):
            self._was_alone = True
            return suspects[0].request_id, True
        self._was_alone = False
        late = (request.request_id for request in suspects if now_s - request.arrival_s > _PATIENCE_S)
        self._joined = next(late, None)
        return self._joined, False


class IsolatingFairQueue(IsolatingQueue):
    """The same around a queue that shares the device between keys. Implements FairQueue."""

    def __init__(self, inner: FairQueue, suspects: Suspects, running: Callable[[], Seq[Sequence]]) -> None:
        super().__init__(inner, suspects, running)  # type: ignore[arg-type]  # a FairQueue is what a WaitingQueue has besides
        self._fair = inner

    @property
    def is_shared(self) -> bool:
        """Passed on."""
        return self._fair.is_shared

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """Passed on."""
        self._fair.set_shares(shares)

    def load(self, key: str) -> Load:
        """Passed on."""
        return self._fair.load(key)

    def charge(self, sequences: Seq[Sequence], num_decodes: int, counts: Seq[int]) -> None:
        """Passed on."""
        self._fair.charge(sequences, num_decodes, counts)

    def rank(self, sequence: Sequence) -> Any:
        """Passed on."""
        return self._fair.rank(sequence)

    def claims(self, max_num_seqs: int) -> list[Sequence]:
        """None while somebody must run alone."""
        return [] if self._watched else self._fair.claims(max_num_seqs)

    def victim(
        self, claim: Sequence, running: Seq[Sequence], cost: Callable[[Sequence], int], total: int
    ) -> Sequence | None:
        """Passed on."""
        return self._fair.victim(claim, running, cost, total)


def isolate(inner: WaitingQueue, suspects: Suspects, running: Callable[[], Seq[Sequence]]) -> IsolatingQueue:
    """The queue with its suspects kept apart, of the same kind."""
    if isinstance(inner, FairQueue):
        return IsolatingFairQueue(inner, suspects, running)
    return IsolatingQueue(inner, suspects, running)
