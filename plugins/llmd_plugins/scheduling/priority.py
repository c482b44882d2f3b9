"""Priorities with aging: a lower number goes first, and waiting makes up for a higher one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmd.api.v1 import SchedulingPolicySpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import SchedulerConfig, Sequence


class PriorityQueue:
    """Sequences by priority less the time waited over `aging_s`.

    At any moment all waited equally much longer, so the order never changes: `priority + arrival / aging_s` is the key.
    """

    def __init__(self, aging_s: float) -> None:
        self._aging_s = aging_s
        self._entries: list[tuple[float, int, Sequence]] = []

    def _entry(self, sequence: Sequence) -> tuple[float, int, Sequence]:
        request = sequence.request
        return request.priority + request.arrival_s / self._aging_s, sequence.seq_id, sequence

    def push(self, sequence: Sequence) -> None:
        """Queue where its key belongs."""
        insort(self._entries, self._entry(sequence))

    def push_front(self, sequence: Sequence) -> None:
        """A preempted sequence has arrived before all that wait in its priority: its key says so already."""
        self.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out, from wherever it stands."""
        del self._entries[bisect_left(self._entries, self._entry(sequence))]

    def ordered(self, now_s: float) -> Iterator[Sequence]:
        """From the first to be served on."""
        for _, _, sequence in list(self._entries):
            yield sequence

    def __len__(self) -> int:
        return len(self._entries)


def _build(config: SchedulerConfig) -> PriorityQueue:
    return PriorityQueue(config.priority_aging_s)


@hookimpl
def llmd_register_scheduling_policies() -> list[SchedulingPolicySpec]:
    """The policy `priority`."""
    return [SchedulingPolicySpec(name="priority", summary="lower numbers first, with aging", build=_build)]
