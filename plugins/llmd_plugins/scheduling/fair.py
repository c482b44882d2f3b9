"""Fair shares between API keys: virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI'24).

    key   weight  served             waiting            the next row goes to the key with the least
    web     2     |#####|            [s7 s9 s12 …]      `served`: tokens of its steps over its weight, an
    batch   1     |########|         [s3 s4 s5 s6 …]    output token counting as two of a prompt
    new     1     .....|  ← lifted   [s13]              to the least of those that wait: idleness is no credit

A key that waits while it holds less than its share of the rows goes before running prompts, and takes a row or blocks of
the key that has most beyond its share: the newest sequence of that one is preempted. Keys of a lower `priority` go first;
a key that waits gains a level each `aging_s`, up to the best that wait. Within a key the order is that of `priority`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

from llmd.api.v1 import Load, SchedulingPolicySpec, Share, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import SchedulerConfig, Sequence

OUTPUT_WEIGHT = 2.0  # of an output token beside one of a prompt, as in the paper
_SHARED_STEPS = 1000  # from the last step of another key until one is taken to be alone
_MAX_IDLE = 1024  # accounts from which on those without a debt are looked for

_key_of = attrgetter("request.key")
_NO_ROWS: Mapping[str, int] = {}


class _Account:
    """One key: what waits of it, and what it has had."""

    __slots__ = ("entries", "num_tokens", "priority", "served", "weight")

    def __init__(self, share: Share) -> None:
        self.weight, self.priority = share
        self.served = 0.0  # weighted tokens of its steps, over its weight
        self.num_tokens = 0  # that wait
        self.entries: list[tuple[float, int, Sequence]] = []  # by priority and arrival

    @property
    def standing(self) -> tuple[int, float]:
        """Who has less goes before."""
        return self.priority, self.served


class FairQueue:
    """Each key's sequences in order, and the keys by what they have had."""

    def __init__(self, aging_s: float) -> None:
        self._aging_s = aging_s
        self._shares: Mapping[str, Share] = {}
        self._accounts: dict[str, _Account] = {}
        self._rows: Mapping[str, int] = _NO_ROWS  # key → rows in the last step
        self._num_entries = 0
        self._num_steps = 0
        self._shared_until = 0  # the step from which on the device is one key's
        self._sole = ""  # the only key of the last step
        self._last: _Account | None = None  # the last that had nothing left waiting

    # --- the queue

    def push(self, sequence: Sequence) -> None:
        """Queue where its priority and arrival say; a key that had nothing waiting starts level with those that have."""
        account = self._account(sequence.request.key)
        if not account.entries:
            account.served = max(account.served, self._floor())
        insort(account.entries, self._entry(sequence))
        account.num_tokens += len(sequence.token_ids)
        self._num_entries += 1

    def push_front(self, sequence: Sequence) -> None:
        """A preempted sequence has arrived before all that wait in its priority: its entry says so already."""
        self.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out, from wherever it stands."""
        account = self._accounts[sequence.request.key]
        del account.entries[bisect_left(account.entries, self._entry(sequence))]
        left = account.num_tokens - len(sequence.token_ids)  # more than was pushed, if a step in flight has added to it
        account.num_tokens = max(0, left) if account.entries else 0
        self._num_entries -= 1
        if not account.entries:
            self._last = account

    def ordered(self, now_s: float) -> Iterator[Sequence]:
        """From the first to be served on; what is yielded is reckoned as served, so that keys take turns within a step."""
        waiting = [account for account in self._accounts.values() if account.entries]
        best = min((account.priority for account in waiting), default=0)
        heap = [
            (self._level(account, best, now_s), account.served, index, account, iter(list(account.entries)))
            for index, account in enumerate(waiting)
        ]
        heapq.heapify(heap)
        while heap:
            level, served, index, account, entries = heap[0]
            if (entry := next(entries, None)) is None:
                heapq.heappop(heap)
                continue
            served += len(entry[2].token_ids) / account.weight
            heapq.heapreplace(heap, (level, served, index, account, entries))
            yield entry[2]

    def __len__(self) -> int:
        return self._num_entries

    def _entry(self, sequence: Sequence) -> tuple[float, int, Sequence]:
        request = sequence.request
        return request.priority + request.arrival_s / self._aging_s, sequence.seq_id, sequence

    def _level(self, account: _Account, best: int, now_s: float) -> float:
        """The key's priority less what its first sequence has waited; as good as the best that wait, never better."""
        waited_s = now_s - account.entries[0][2].request.arrival_s
        return max(float(best), account.priority - max(0.0, waited_s) / self._aging_s)

    # --- accounts

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """What the operator grants; what a key has had stays as it is."""
        self._shares = shares
        for key, account in self._accounts.items():
            account.weight, account.priority = shares.get(key, Share())

    def load(self, key: str) -> Load:
        """What waits of a key."""
        account = self._accounts.get(key)
        return Load(len(account.entries), account.num_tokens) if account else Load(0, 0)

    def _account(self, key: str) -> _Account:
        account = self._accounts.get(key)
        if account is None:
            if len(self._accounts) >= _MAX_IDLE:
                self._forget()
            account = self._accounts[key] = _Account(self._shares.get(key, Share()))
        return account

    def _forget(self) -> None:
        """Drop the accounts that would be lifted anyway when their key comes back."""
        floor, rows = self._floor(), self._rows
        idle = [k for k, a in self._accounts.items() if not a.entries and k not in rows and a.served <= floor]
        for key in idle:
            del self._accounts[key]

    def _floor(self) -> float:
        """Where a key that comes starts at least: with the least served that waits, or else with the last that did."""
        found = min((account.served for account in self._accounts.values() if account.entries), default=None)
        if found is None:
            return self._last.served if self._last is not None else 0.0
        return found

    @property
    def is_shared(self) -> bool:
        """Whether a step of late was not the same key's alone."""
        return self._num_steps < self._shared_until

    def _note(self, rows: Mapping[str, int]) -> None:
        """Whose rows a step has."""
        self._rows = rows
        self._num_steps += 1
        sole = next(iter(rows))
        if len(rows) > 1 or (sole != self._sole and self._num_steps > 1):
            self._shared_until = self._num_steps + _SHARED_STEPS
        self._sole = sole

    def charge(self, sequences: Items[Sequence], num_decodes: int, counts: Items[int]) -> None:
        """Count a step's tokens; what is computed a second time after a preemption is not the key's fault."""
        accounts = self._accounts
        if len(accounts) == 1:
            ((key, account),) = accounts.items()
            account.served += (OUTPUT_WEIGHT * num_decodes + sum(counts)) / account.weight
            self._note({key: len(sequences)})
            return
        decodes = Counter(map(_key_of, islice(sequences, num_decodes)))
        for key, count in decodes.items():
            account = self._account(key)
            account.served += OUTPUT_WEIGHT * count / account.weight
        for sequence, count in zip(islice(sequences, num_decodes, None), counts, strict=True):
            key = sequence.request.key
            decodes[key] += 1
            if not sequence.num_preemptions:
                account = self._account(key)
                account.served += count / account.weight
        self._note(decodes)

    # --- who goes before, and who gives way

    def rank(self, sequence: Sequence) -> tuple[int, float]:
        """Of two prompts that run, the one whose key has had less goes on."""
        account = self._accounts.get(sequence.request.key)
        return account.standing if account is not None else (0, 0.0)

    def claims(self, max_num_seqs: int) -> list[Sequence]:
        """The first sequence of each key that waits with less than its share of rows while a key with more runs."""
        if len(self._accounts) < 2 or not self._num_entries:
            return []
        rows, accounts = self._rows, self._accounts
        unit = max_num_seqs / self._active_weight(rows)
        most = heapq.nlargest(2, ((accounts[key].standing, key) for key in rows if key in accounts))
        found = [
            account
            for key, account in accounts.items()
            if account.entries
            and rows.get(key, 0) < account.weight * unit
            and any(account.standing <= standing for standing, other in most if other != key)
        ]
        found.sort(key=attrgetter("standing"))
        heads = (next((entry[2] for entry in account.entries if entry[2].is_admissible), None) for account in found)
        return [head for head in heads if head is not None]

    def _active_weight(self, running: Iterable[str]) -> float:
        """The weight of all keys that wait or run."""
        active = {key for key, account in self._accounts.items() if account.entries}.union(running)
        return sum(self._accounts[key].weight for key in active if key in self._accounts) or 1.0

    def victim(
        self, claim: Sequence, running: Items[Sequence], cost: Callable[[Sequence], int], total: int
    ) -> Sequence | None:
        """The newest sequence of the key that keeps most beyond its share without it, of keys that have had no less.

        A key never falls below its share by a claim: two keys do not take the same row from each other in turns.
        """
        held: Counter[str] = Counter()
        newest: dict[str, Sequence] = {}
        for sequence in running:
            key = sequence.request.key
            held[key] += cost(sequence)
            newest[key] = sequence
        own = claim.request.key
        unit, standing = total / self._active_weight([*held, own]), self._account(own).standing
        left_over = {
            key: held[key] - cost(sequence) - self._account(key).weight * unit
            for key, sequence in newest.items()
            if key != own and self._account(key).standing >= standing
        }
        key = max(left_over, key=left_over.__getitem__, default=own)
        return newest[key] if left_over.get(key, -1.0) >= 0 else None


def _build(config: SchedulerConfig) -> FairQueue:
    return FairQueue(config.priority_aging_s)


@hookimpl
def llmd_register_scheduling_policies() -> list[SchedulingPolicySpec]:
    """The policy `fair`, which is the default: with a single key it is that of `priority`."""
    return [SchedulingPolicySpec(name="fair", summary="equal or weighted shares for API keys", build=_build)]
