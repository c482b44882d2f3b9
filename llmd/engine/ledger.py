"""What there is: requests, sequences, rows and blocks, and how sequences come and go. Everything in it must balance."""

from __future__ import annotations

import heapq
import itertools
from operator import attrgetter
from typing import NamedTuple

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.adapter_slots import AdapterSlots
from llmd.engine.executor import ExecutorInfo
from llmd.engine.kv_cache import KVCacheManager
from llmd.engine.params import SamplingParams
from llmd.engine.queue import FairQueue, WaitingQueue
from llmd.engine.request import Request
from llmd.engine.sequence import Sequence, SequenceState
from llmd.engine.step import FinishReason, SequenceDelta, StepPlan, TokenUpdate

by_order = attrgetter("order")


class Step(NamedTuple):
    """A plan and whose rows it computes, in the plan's order."""

    plan: StepPlan
    sequences: list[Sequence]
    num_decodes: int  # the first so many rows compute one token after their prompt


class Ledger:
    """Owns requests, sequences, rows and blocks."""

    def __init__(self, config: SchedulerConfig, cache: CacheConfig, info: ExecutorInfo, waiting: WaitingQueue) -> None:
        self.config = config
        self.info = info
        self.waiting = waiting
        self.kv_cache = KVCacheManager(
            info.num_blocks, info.block_size, info.kv_groups, enable_prefix_caching=cache.enable_prefix_caching
        )
        self.adapters = AdapterSlots(info.max_loras, info.max_cpu_loras, config.adapter_drain_threshold)
        self.running: list[Sequence] = []  # by order: priority, then arrival
        self.requests: dict[str, list[Sequence]] = {}  # those with a sequence that has not finished
        self.num_waiting_tokens = 0
        self.num_preemptions = 0
        self.num_admitted = 0
        self.num_finished = 0
        self._num_planned = 0  # steps
        self._num_committed = 0
        self._free_rows = list(range(info.max_num_seqs - 1, -1, -1))
        self._released: list[int] = []  # rows that the next plan tells the executor to release, before it admits
        self._token_updates: list[TokenUpdate] = []  # forced tokens that the next plan tells the executor
        self._num_constrained = 0  # live sequences that follow a grammar
        self._deadlines: list[tuple[float, str]] = []  # a heap
        self._seq_ids = itertools.count()
        self.set_queue(config, waiting)

    def set_queue(self, config: SchedulerConfig, waiting: WaitingQueue) -> None:
        """By which policy sequences wait, and what is left free for those that run; only while nothing waits."""
        self.config, self.waiting = config, waiting
        self._num_spare = int(config.watermark * self.info.num_blocks)
        self._with_priority = config.policy not in ("fcfs", "fair")
        self._fair = waiting if isinstance(waiting, FairQueue) else None

    def add(self, request: Request, seed: int) -> list[Sequence]:
        """Queue the request's sequences, which are returned; sequence i draws from `seed + i`."""
        sequences: list[Sequence] = []
        for index in range(request.num_sequences):
            sequence = Sequence(request, index, next(self._seq_ids), seed + index, self.info.max_model_len)
            sequence.order = (request.priority if self._with_priority else 0, sequence.seq_id)
            sequence.leader = sequences[0] if sequences and not self.kv_cache.has_state else None
            if request.adapter is not None:
                self._add_to_adapter(request.adapter, sequence)
            sequences.append(sequence)
            self.waiting.push(sequence)
        self._num_constrained += len(sequences) if request.grammar is not None else 0
        self.num_waiting_tokens += len(request.prompt) * len(sequences)
        self.num_admitted += len(sequences)
        self.requests[request.request_id] = sequences
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.request_id))
        return sequences

    def _add_to_adapter(self, name: str, sequence: Sequence) -> None:
        entry = self.adapters.get(name)
        assert entry is not None, "the engine checks names"
        self.adapters.add(entry, sequence)

    @property
    def next_deadline_s(self) -> float | None:
        """When the next request expires, if any has a deadline."""
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now_s: float) -> list[SequenceDelta]:
        """End the requests whose deadline has passed."""
        deltas: list[SequenceDelta] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, request_id = heapq.heappop(self._deadlines)
            deltas += self.end_request(request_id, FinishReason.TIMEOUT)
        return deltas

    def end_request(self, request_id: str, reason: FinishReason, error: str | None = None) -> list[SequenceDelta]:
        """End what is left of a request; the last delta of each of its live sequences."""
        live = [sequence for sequence in self.requests.get(request_id, ()) if not sequence.is_finished]
        for sequence in live:
            self.end(sequence, reason, error)
        return [last_delta(sequence) for sequence in live]

    def end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """Finish one sequence and take back its row and blocks. Steps in flight for it are computed in vain."""
        if sequence.state is SequenceState.RUNNING:
            self._leave_row(sequence)
        else:
            self._leave_queue(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason, sequence.error = reason, error
        if sequence.first_scheduled_s is not None:
            sequence.num_steps = max(0, self._num_committed - sequence.first_step)
        self.num_finished += 1
        if sequence.adapter is not None:
            self.adapters.finish(sequence.adapter, sequence)
        self._num_constrained -= sequence.matcher is not None
        siblings = self.requests[sequence.request.request_id]
        if len(siblings) == 1 or all(sibling.is_finished for sibling in siblings):
            del self.requests[sequence.request.request_id]

    def _leave_row(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.running.remove(sequence)
        self.kv_cache.release(sequence)
        if sequence.adapter is not None:
            self.adapters.leave(sequence.adapter)
        self._free_rows.append(sequence.row)
        self._released.append(sequence.row)
        if self._token_updates:
            self._token_updates = [update for update in self._token_updates if update.row != sequence.row]
        sequence.row = None

    def _leave_queue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.num_waiting_tokens -= len(sequence.token_ids)

    def _preempt(self, sequence: Sequence) -> None:
        """Take row and blocks back; what it computed is recomputed, or found again in the prefix cache."""
        self._leave_row(sequence)
        sequence.state = SequenceState.PREEMPTED
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push_front(sequence)
        self.num_waiting_tokens += len(sequence.token_ids)

    def end_one(self, sequence: Sequence, reason: FinishReason, error: str) -> list[SequenceDelta]:
        """End one sequence of a request; its last delta."""
        self.end(sequence, reason, error)
        return [last_delta(sequence)]

    def check(self) -> None:
        """Raise AssertionError unless every counter that must balance does."""
        held = [block_id for sequence in self.running for table in sequence.block_ids for block_id in table]
        self.kv_cache.pool.check(held)
        rows = [sequence.row for sequence in self.running]
        assert {*self._free_rows, *rows} == set(range(self.info.max_num_seqs)), "a row is lost"
        assert len(self._free_rows) + len(rows) == self.info.max_num_seqs, "a row is free twice"
        assert self.running == sorted(self.running, key=by_order)
        self.adapters.check(sequence for group in self.requests.values() for sequence in group)
        live = sum(not sequence.is_finished for group in self.requests.values() for sequence in group)
        assert live == len(self.running) + len(self.waiting), "a sequence is lost"
        assert self.num_admitted == self.num_finished + live


def last_delta(sequence: Sequence, token_ids: tuple[int, ...] = ()) -> SequenceDelta:
    params = sequence.request.params
    stop_token_id = None
    if token_ids and sequence.finish_reason is FinishReason.STOP and isinstance(params, SamplingParams):
        stop_token_id = token_ids[-1] if token_ids[-1] in params.stop_token_ids else None
    return SequenceDelta(
        request_id=sequence.request.request_id,
        index=sequence.index,
        token_ids=token_ids,
        finish_reason=sequence.finish_reason,
        stop_token_id=stop_token_id,
        error=sequence.error,
        num_cached_tokens=sequence.num_cached_tokens,
    )
