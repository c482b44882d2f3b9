"""The waiting queue's contract; policies are plugins (`scheduling_policies`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llmd.engine.sequence import Sequence


class WaitingQueue(Protocol):
    """Sequences that wait for a row and blocks, in the order in which they should get them.

    `push_front` takes back a preempted sequence: it goes before all others of its priority.
    """

    def push(self, sequence: Sequence) -> None: ...

    def push_front(self, sequence: Sequence) -> None: ...

    def remove(self, sequence: Sequence) -> None: ...

    def ordered(self, now_s: float) -> Iterator[Sequence]:
        """Yield the sequences from the first to be served on; the caller may remove the one it was just given."""

    def __len__(self) -> int: ...
