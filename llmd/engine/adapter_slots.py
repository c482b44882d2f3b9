"""Which adapters are known, where each of them lies, and who may run: plain ints, owned by the loop thread.

    declared ──► loading ──► loaded (host memory) ──► in a slot (device)
        ▲                        │ least recently used goes        │ least recently used, pinned by no row, goes
        └────────────────────────┴─────────────────────────────────┘

A sequence enters a row only with its adapter in a slot, and pins it there while it runs. Where more adapters are wanted than
there are slots, one that has started `drain_threshold` sequences since it got its slot starts no more: its rows end, and the
slot goes to whoever is first in the waiting queue. So each adapter that waits gets its turn after a bounded number of
sequences of others, however many there are.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple

from llmd.engine.executor import AdapterFacts
from llmd.engine.sequence import Sequence, SequenceState
from llmd.engine.step import AdapterLoad


class AdapterState(StrEnum):
    """Where an adapter stands."""

    DECLARED = "declared"  # its files are known
    LOADING = "loading"
    LOADED = "loaded"  # in host memory, or in a slot
    DRAINING = "draining"  # takes no new requests; goes when its sequences have ended


class AdapterInfo(NamedTuple):
    """A reading of one adapter."""

    name: str
    path: str
    state: AdapterState
    slot: int | None
    rank: int  # 0 until it was read
    num_bytes: int
    num_running: int  # sequences in rows
    num_waiting: int
    num_requests: int
    num_loads: int  # files read
    num_slot_loads: int
    num_evictions: int  # from its slot
    wait_s: float  # from arrival to a row, of all its sequences


class AdapterEntry:
    """One generation of an adapter: the same name loaded again is another entry."""

    __slots__ = (
        "adapter_id", "facts", "is_on_host", "is_reading", "is_retiring", "last_used", "name", "num_evictions", "num_loads",
        "num_requests", "num_running", "num_slot_loads", "num_started", "on_gone", "on_read", "path", "sequences", "slot",
        "slot_since", "wait_s",
    )  # fmt: skip

    def __init__(self, name: str, path: str, adapter_id: int) -> None:
        self.name, self.path, self.adapter_id = name, path, adapter_id
        self.facts = AdapterFacts(0, 0)
        self.is_on_host = self.is_reading = self.is_retiring = False
        self.slot: int | None = None
        self.slot_since = 0  # on the ledger's clock
        self.sequences: dict[int, Sequence] = {}  # those that have not ended, by seq_id
        self.num_running = 0  # of these in rows: they pin the slot
        self.num_started = 0  # sequences that entered a row since it got its slot
        self.last_used = 0
        self.on_read: list[Callable[[Exception | None], None]] = []  # told once how reading its files went
        self.on_gone: list[Callable[[], None]] = []  # told when it has drained
        self.num_requests = self.num_loads = self.num_slot_loads = self.num_evictions = 0
        self.wait_s = 0.0

    @property
    def state(self) -> AdapterState:
        """Where it stands."""
        if self.is_retiring:
            return AdapterState.DRAINING
        if self.is_reading:
            return AdapterState.LOADING
        return AdapterState.LOADED if self.is_on_host or self.slot is not None else AdapterState.DECLARED

    @property
    def num_waiting(self) -> int:
        """Live sequences without a row."""
        return len(self.sequences) - self.num_running

    @property
    def info(self) -> AdapterInfo:
        """A reading."""
        return AdapterInfo(
            self.name, self.path, self.state, self.slot, *self.facts, self.num_running, self.num_waiting, self.num_requests,
            self.num_loads, self.num_slot_loads, self.num_evictions, self.wait_s,
        )  # fmt: skip


class AdapterSlots:
    """The ledger. What the executor must do is taken from it: `take_reads` and `take_drops`; slot loads go into plans."""

    def __init__(self, num_slots: int, num_host: int, drain_threshold: int) -> None:
        self._drain_threshold = drain_threshold
        self._num_host = num_host
        self._slots: list[AdapterEntry | None] = [None] * num_slots
        self._by_name: dict[str, AdapterEntry] = {}
        self._entries: dict[int, AdapterEntry] = {}  # by id, those that are retiring too
        self._live: dict[int, AdapterEntry] = {}  # those with live sequences
        self._ids = itertools.count(1)
        self._clock = itertools.count(1)
        self._wanted: deque[AdapterEntry] = deque()  # to be read, in the order in which they were asked for
        self._drops: list[int] = []
        self._draining: set[AdapterEntry] = set()

    # --- names

    @property
    def is_enabled(self) -> bool:
        """Whether there are slots at all."""
        return bool(self._slots)

    def get(self, name: str) -> AdapterEntry | None:
        """What new requests of this name use."""
        return self._by_name.get(name)

    def infos(self) -> list[AdapterInfo]:
        """Readings of all that can be asked for, and of those that still drain."""
        named = list(self._by_name.values())
        return [entry.info for entry in (*named, *(entry for entry in self._entries.values() if entry.is_retiring))]

    def make(self, name: str, path: str) -> AdapterEntry:
        """A new entry that no request can ask for yet."""
        entry = AdapterEntry(name, path, next(self._ids))
        self._entries[entry.adapter_id] = entry
        return entry

    def publish(self, entry: AdapterEntry) -> None:
        """Requests of its name use it from now on; what had the name before drains."""
        before = self._by_name.get(entry.name)
        self._by_name[entry.name] = entry
        if before is not None and before is not entry:
            self.retire(before)

    def retire(self, entry: AdapterEntry, on_gone: Callable[[], None] | None = None) -> None:
        """Take no more requests; `on_gone` is called when its last sequence has ended."""
        if on_gone is not None:
            entry.on_gone.append(on_gone)
        entry.is_retiring = True
        if self._by_name.get(entry.name) is entry:
            del self._by_name[entry.name]
        self._forget_if_idle(entry)

    def _forget_if_idle(self, entry: AdapterEntry) -> None:
        if not entry.is_retiring or entry.sequences or entry.is_reading or entry.adapter_id not in self._entries:
            return
        del self._entries[entry.adapter_id]
        self._leave_host(entry)
        self._leave_slot(entry)
        for tell in entry.on_gone:
            tell()

    # --- files and host memory

    def want(self, entry: AdapterEntry) -> None:
        """Have it read, unless it is there or on its way."""
        if not (entry.is_on_host or entry.is_reading or entry in self._wanted):
            self._wanted.append(entry)

    def take_reads(self) -> list[AdapterEntry]:
        """Entries whose files are to be read now: as many as host memory has room for."""
        found: list[AdapterEntry] = []
        while self._wanted and (self._wanted[0].adapter_id not in self._entries or self._make_room()):
            entry = self._wanted.popleft()
            if entry.adapter_id in self._entries:
                entry.is_reading = True
                found.append(entry)
        return found

    def take_drops(self) -> list[int]:
        """Ids whose host copies are to be let go."""
        drops, self._drops = self._drops, []
        return drops

    @property
    def has_errands(self) -> bool:
        """Whether there is something to take."""
        return bool(self._wanted or self._drops)

    def _make_room(self) -> bool:
        """Whether host memory can take one more, the least recently used going for it."""
        held = [entry for entry in self._entries.values() if entry.is_on_host or entry.is_reading]
        if len(held) < self._num_host:
            return True
        idle = [entry for entry in held if entry.is_on_host and not (entry.num_waiting and entry.slot is None)]
        if not idle:
            return False
        self._leave_host(min(idle, key=_last_used))
        return True

    def _leave_host(self, entry: AdapterEntry) -> None:
        if entry.is_on_host:
            entry.is_on_host = False
            self._drops.append(entry.adapter_id)

    def loaded(self, entry: AdapterEntry, facts: AdapterFacts) -> None:
        """Its files are in host memory: who waited for them may enter."""
        entry.facts, entry.is_reading, entry.is_on_host = facts, False, True
        entry.num_loads += 1
        entry.last_used = next(self._clock)
        for sequence in entry.sequences.values():
            if sequence.state is SequenceState.LOADING:
                sequence.state = SequenceState.WAITING
        self._tell_read(entry, None)

    def failed(self, entry: AdapterEntry, error: Exception) -> list[str]:
        """Its files cannot be used: the requests that can not be served any more."""
        entry.is_reading = False
        waiting = [sequence.request.request_id for sequence in entry.sequences.values()]
        self._tell_read(entry, error)
        return list(dict.fromkeys(waiting))

    def abandon(self, error: Exception) -> None:
        """Nothing will be read any more: tell those who wait for it."""
        for entry in list(self._entries.values()):
            entry.is_reading = False
            self._tell_read(entry, error)

    def _tell_read(self, entry: AdapterEntry, error: Exception | None) -> None:
        listeners, entry.on_read = entry.on_read, []
        for tell in listeners:
            tell(error)
        self._forget_if_idle(entry)

    # --- sequences

    def add(self, entry: AdapterEntry, sequence: Sequence) -> None:
        """A sequence of this adapter waits."""
        sequence.adapter = entry
        entry.sequences[sequence.seq_id] = sequence
        entry.num_requests += sequence.index == 0
        self._live[entry.adapter_id] = entry
        if not entry.is_on_host and entry.slot is None:
            sequence.state = SequenceState.LOADING
            self.want(entry)

    def finish(self, entry: AdapterEntry, sequence: Sequence) -> None:
        """One of its sequences has ended."""
        del entry.sequences[sequence.seq_id]
        if not entry.sequences:
            del self._live[entry.adapter_id]
            self._forget_if_idle(entry)

    def begin(self) -> None:
        """The scheduler is about to admit: find out whose slots others wait for."""
        self._draining.clear()
        if not self._live:
            return
        needy = sum(entry.slot is None and entry.is_on_host and entry.num_waiting > 0 for entry in self._live.values())
        short = needy - sum(entry is None or not entry.sequences for entry in self._slots)
        if short > 0:
            served = [entry for entry in self._held() if entry.num_started >= self._drain_threshold]
            self._draining.update(sorted(served, key=_slot_since)[:short])

    def can_enter(self, sequence: Sequence) -> bool:
        """Whether a sequence may have a row now: its adapter has a slot, or can have one."""
        entry = sequence.adapter
        if entry is None:
            return True
        if entry.slot is not None:
            return entry not in self._draining or sequence.state is SequenceState.PREEMPTED
        if not entry.is_on_host:
            self.want(entry)
            return False
        return self._find_slot() is not None

    def enter(self, sequence: Sequence, now_s: float) -> AdapterLoad | None:
        """A sequence with an adapter gets a row; the load that its plan must bring if the adapter had no slot."""
        entry, load = sequence.adapter, None
        assert entry is not None
        if entry.slot is None:
            slot = self._find_slot()
            assert slot is not None, "a sequence entered without a slot"
            load = self._take_slot(entry, slot)
        entry.num_running += 1
        entry.num_started += 1
        if not sequence.num_preemptions:
            entry.wait_s += max(0.0, now_s - sequence.request.arrival_s)
        entry.last_used = next(self._clock)
        return load

    def leave(self, entry: AdapterEntry) -> None:
        """One of its sequences leaves its row."""
        entry.num_running -= 1

    def undo(self, loads: Iterable[AdapterLoad]) -> None:
        """These may not have been done: unless a row uses the slot, its adapter must be put into one again."""
        for load in loads:
            entry = self._slots[load.slot]
            if entry is not None and entry.adapter_id == load.adapter_id and not entry.num_running:
                self._leave_slot(entry)
                if entry.num_waiting:
                    self.want(entry)

    def _find_slot(self) -> int | None:
        """A free slot, or else the one least recently used that no row pins, of an adapter that nobody waits for if any."""
        best: tuple[bool, int] | None = None
        found: int | None = None
        for slot, entry in enumerate(self._slots):
            if entry is None:
                return slot
            if not entry.num_running:
                rank = (entry.num_waiting > 0, entry.last_used)
                if best is None or rank < best:
                    best, found = rank, slot
        return found

    def _take_slot(self, entry: AdapterEntry, slot: int) -> AdapterLoad:
        before = self._slots[slot]
        if before is not None:
            before.num_evictions += 1
            self._leave_slot(before)
            if before.num_waiting:
                self.want(before)
        self._slots[slot] = entry
        entry.slot, entry.num_started, entry.slot_since = slot, 0, next(self._clock)
        entry.num_slot_loads += 1
        return AdapterLoad(slot, entry.adapter_id)

    def _leave_slot(self, entry: AdapterEntry) -> None:
        if entry.slot is not None:
            self._slots[entry.slot] = None
            entry.slot = None

    # --- books

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless pins and slots are those of the live sequences."""
        live = [sequence for sequence in sequences if sequence.adapter is not None and not sequence.is_finished]
        for entry in {*self._entries.values(), *self._held()}:
            mine = [sequence for sequence in live if sequence.adapter is entry]
            running = sum(sequence.state is SequenceState.RUNNING for sequence in mine)
            assert (len(entry.sequences), entry.num_running) == (len(mine), running), f"{entry.name}: pins do not balance"
            assert not running or entry.slot is not None, f"{entry.name} runs without a slot"
            assert entry.slot is None or self._slots[entry.slot] is entry, f"{entry.name}: its slot is another's"
        assert len(set(map(id, self._held()))) == len(list(self._held())), "an adapter has two slots"
        assert sum(entry.is_on_host or entry.is_reading for entry in self._entries.values()) <= self._num_host

    def _held(self) -> Iterator[AdapterEntry]:
        return (entry for entry in self._slots if entry is not None)

    @property
    def is_reading(self) -> bool:
        """Whether somebody may be waiting for files."""
        return any(entry.is_reading for entry in self._entries.values())

    @property
    def is_balanced(self) -> bool:
        """Whether nothing is pinned: what must be so when nothing runs."""
        return not self._live and all(entry.num_running == 0 for entry in self._entries.values())


def _last_used(entry: AdapterEntry) -> int:
    return entry.last_used


def _slot_since(entry: AdapterEntry) -> int:
    return entry.slot_since
