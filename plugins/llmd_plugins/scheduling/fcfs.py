"""First come, first served."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmd.api.v1 import SchedulingPolicySpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import SchedulerConfig, Sequence


class FcfsQueue:
    """Sequences in the order of their arrival, preempted ones before all others."""

    def __init__(self) -> None:
        self._entries: OrderedDict[int, Sequence] = OrderedDict()

    def push(self, sequence: Sequence) -> None:
        """Queue at the end."""
        self._entries[sequence.seq_id] = sequence

    def push_front(self, sequence: Sequence) -> None:
        """Queue before all others."""
        self._entries[sequence.seq_id] = sequence
        self._entries.move_to_end(sequence.seq_id, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Take out, from wherever it stands."""
        del self._entries[sequence.seq_id]

    def ordered(self, now_s: float) -> Iterator[Sequence]:
        """From the first to be served on."""
        yield from list(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)


def _build(config: SchedulerConfig) -> FcfsQueue:
    return FcfsQueue()


@hookimpl
def llmd_register_scheduling_policies() -> list[SchedulingPolicySpec]:
    """The default policy."""
    return [SchedulingPolicySpec(name="fcfs", summary="first come, first served", build=_build)]
