"""The waiting queue's contract; policies are plugins (`scheduling_policies`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

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


class Share(NamedTuple):
    """What the operator grants a key beside others."""

    weight: float = 1.0
    priority: int = 0  # lower goes first


class Load(NamedTuple):
    """What waits of one key."""

    num_sequences: int
    num_tokens: int


@runtime_checkable
class FairQueue(Protocol):
    """What a queue has besides, if it shares the device between keys (`Request.key`). Optional: found by its methods."""

    @property
    def is_shared(self) -> bool:
        """Whether several keys were served of late: steps are kept short then."""

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """Take the shares of these keys; others have `Share()`."""

    def load(self, key: str) -> Load:
        """What waits of a key."""

    def charge(self, sequences: Items[Sequence], num_decodes: int, counts: Items[int]) -> None:
        """A step is planned: its rows, the first so many of which compute one token, `counts` those of the others."""

    def rank(self, sequence: Sequence) -> Any:
        """What sequences are sorted by where they want the same tokens of a step."""

    def claims(self, max_num_seqs: int) -> list[Sequence]:
        """Waiting sequences, at most one a key, that go before running prompts and may take another key's row."""

    def victim(
        self, claim: Sequence, running: Items[Sequence], cost: Callable[[Sequence], int], total: int
    ) -> Sequence | None:
        """The running sequence that gives way to a claim: `cost` is what one holds of `total`. None: no key has too much."""
