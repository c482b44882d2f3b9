"""Who computes what in the next step, and what becomes of its result. Plain ints; no clock but the one handed in.

There are no modes: a sequence has tokens computed and tokens known (or about to be sampled by a step in flight), and a
step lets the first catch up within the token budget. First the rows that need one token, so that a long prompt never
stalls them; then the rest of running prompts, in order; then waiting sequences. Blocks for all known tokens are taken when
a row is given, so only growth by one token can find the pool empty: then the last running sequence that is not yet part
of the step is preempted and recomputed later. The oldest is never preempted, hence every admitted sequence ends.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import insort
from operator import attrgetter
from typing import NamedTuple

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.executor import ExecutorInfo
from llmd.engine.grammar import GrammarMatcher
from llmd.engine.kv_cache import KVCacheManager
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.planning import PlanDraft
from llmd.engine.queue import WaitingQueue
from llmd.engine.request import Request
from llmd.engine.sequence import Sequence, SequenceState
from llmd.engine.step import (
    BlockUpdate,
    FinishReason,
    RowAdmit,
    SequenceDelta,
    StepPlan,
    StepResult,
    TokenUpdate,
)

_by_order = attrgetter("order")


class Step(NamedTuple):
    """A plan and whose rows it computes, in the plan's order."""

    plan: StepPlan
    sequences: list[Sequence]
    num_decodes: int  # the first so many rows compute one token after their prompt


class Scheduler:
    """Owns requests, sequences, rows and blocks; called by the engine on the loop thread only."""

    def __init__(self, config: SchedulerConfig, cache: CacheConfig, info: ExecutorInfo, waiting: WaitingQueue) -> None:
        self.config = config
        self.info = info
        self.waiting = waiting
        self.kv_cache = KVCacheManager(
            info.num_blocks, info.block_size, info.kv_groups, enable_prefix_caching=cache.enable_prefix_caching
        )
        self.running: list[Sequence] = []  # by order: priority, then arrival
        self.requests: dict[str, list[Sequence]] = {}  # those with a sequence that has not finished
        self.num_waiting_tokens = 0
        self.num_preemptions = 0
        self.num_admitted = 0
        self.num_finished = 0
        self._num_spare = int(config.watermark * info.num_blocks)
        self._free_rows = list(range(info.max_num_seqs - 1, -1, -1))
        self._released: list[int] = []  # rows that the next plan tells the executor to release, before it admits
        self._token_updates: list[TokenUpdate] = []  # forced tokens that the next plan tells the executor
        self._num_constrained = 0  # live sequences that follow a grammar
        self._deadlines: list[tuple[float, str]] = []  # a heap
        self._seq_ids = itertools.count()
        self._step_ids = itertools.count()
        self._with_priority = config.policy != "fcfs"

    # --- requests come and go

    def add(self, request: Request, seed: int) -> None:
        """Queue the request's sequences; sequence i draws from `seed + i`."""
        sequences: list[Sequence] = []
        for index in range(request.num_sequences):
            sequence = Sequence(request, index, next(self._seq_ids), seed + index, self.info.max_model_len)
            sequence.order = (request.priority if self._with_priority else 0, sequence.seq_id)
            sequence.leader = sequences[0] if sequences else None
            sequences.append(sequence)
            self.waiting.push(sequence)
        self._num_constrained += len(sequences) if request.grammar is not None else 0
        self.num_waiting_tokens += len(request.prompt) * len(sequences)
        self.num_admitted += len(sequences)
        self.requests[request.request_id] = sequences
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.request_id))

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
        return [_delta(sequence) for sequence in live]

    def end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """Finish one sequence and take back its row and blocks. Steps in flight for it are computed in vain."""
        if sequence.state is SequenceState.RUNNING:
            self._leave_row(sequence)
        else:
            self._leave_queue(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason, sequence.error = reason, error
        self.num_finished += 1
        self._num_constrained -= sequence.matcher is not None
        siblings = self.requests[sequence.request.request_id]
        if len(siblings) == 1 or all(sibling.is_finished for sibling in siblings):
            del self.requests[sequence.request.request_id]

    def _leave_row(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.running.remove(sequence)
        self.kv_cache.release(sequence)
        self._free_rows.append(sequence.row)
        self._released.append(sequence.row)
        if self._token_updates:
            self._token_updates = [update for update in self._token_updates if update.row != sequence.row]
        sequence.row = None

    def _leave_queue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.num_waiting_tokens -= len(sequence.token_ids)

    # --- planning

    def schedule(self, now_s: float) -> Step | None:
        """Plan the next step and count it as computed; None when there is nothing to do until a step in flight ends."""
        draft = PlanDraft(self.config.max_num_batched_tokens)
        prompts = self._schedule_decodes(draft)
        for sequence in prompts:
            if sequence.state is SequenceState.RUNNING and draft.budget and self._has_blocks(sequence, draft):
                draft.compute(sequence, min(sequence.num_tokens - sequence.num_computed_tokens, draft.budget))
        if self._free_rows and draft.budget and len(self.waiting) and not draft.has_preempted:
            self._admit(draft, now_s)
        if not draft.rows:
            return None
        plan = draft.plan(next(self._step_ids), self._released, self._token_updates, with_masks=self._num_constrained > 0)
        self._released, self._token_updates = [], []
        return Step(plan, draft.sequences, draft.num_decodes)

    def _schedule_decodes(self, draft: PlanDraft) -> list[Sequence]:
        """Give a token to each running sequence that lacks just one; return those that lack more.

        The loop that runs for every row of every step: it calls nothing for a row that stays in its last block.
        """
        prompts: list[Sequence] = []
        block_size = self.info.block_size
        rows, starts, sequences = draft.rows, draft.starts, draft.sequences
        running = self.running
        position = 0
        while position < len(running):
            sequence = running[position]
            position += 1
            start = sequence.num_computed_tokens
            lacking = sequence.num_tokens - start
            if start >= sequence.max_computed or lacking <= 0:
                continue
            if lacking > 1 or not sequence.samples:
                prompts.append(sequence)
                continue
            if not draft.budget:
                break
            is_full = start % block_size == 0 and start == len(sequence.block_ids[0]) * block_size
            if is_full and not self._grow(sequence, draft):
                break  # it was preempted itself: the last one that could be
            sequence.num_computed_tokens = start + 1
            sequence.num_tokens += 1
            sequence.num_in_flight += 1
            rows.append(sequence.row)  # type: ignore[arg-type]
            starts.append(start)
            sequences.append(sequence)
            draft.budget -= 1
        draft.num_decodes = len(rows)
        return prompts

    def _grow(self, sequence: Sequence, draft: PlanDraft) -> bool:
        """One more block for a running sequence, preempting from the tail; False when it had to go itself."""
        while (block_ids := self.kv_cache.grow(sequence)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            draft.has_preempted = True
            if victim is sequence:
                return False
        assert sequence.row is not None
        last = len(sequence.block_ids[0]) - 1
        for group, block_id in enumerate(block_ids):
            draft.block_updates.append(BlockUpdate(sequence.row, group, last, (block_id,)))
        return True

    def _has_blocks(self, sequence: Sequence, draft: PlanDraft) -> bool:
        """Whether all its known tokens have blocks, taking more where a grammar has forced tokens.

        Rows of the draft are not preempted: beside them it waits until they have gone on.
        """
        while len(sequence.block_ids[0]) * self.info.block_size < sequence.num_tokens:
            if draft.rows and self.kv_cache.pool.num_free < self.kv_cache.num_groups:
                return False
            if not self._grow(sequence, draft):
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take row and blocks back; what it computed is recomputed, or found again in the prefix cache."""
        self._leave_row(sequence)
        sequence.state = SequenceState.PREEMPTED
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push_front(sequence)
        self.num_waiting_tokens += len(sequence.token_ids)

    def _admit(self, draft: PlanDraft, now_s: float) -> None:
        """Give rows to waiting sequences in the queue's order, as far as rows, blocks and budget go."""
        for sequence in self.waiting.ordered(now_s):
            if not self._free_rows or draft.budget <= 0:
                return
            if not sequence.is_admissible:
                continue  # its leader or a step in flight comes first; neither waits for anything behind it
            if self.info.needs_whole_prompts and draft.rows and sequence.num_tokens > draft.budget:
                return
            num_spare = self._num_spare if self.running else 0
            if not self.kv_cache.admit(sequence, num_spare, use_cache=_may_use_cache(sequence)):
                return
            self._enter_row(sequence, self._free_rows.pop(), draft, now_s)
            lacking = sequence.num_tokens - sequence.num_computed_tokens
            draft.compute(sequence, lacking if self.info.needs_whole_prompts else min(lacking, draft.budget))

    def _enter_row(self, sequence: Sequence, row: int, draft: PlanDraft, now_s: float) -> None:
        self._leave_queue(sequence)
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = now_s
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        sequence.state = SequenceState.RUNNING
        sequence.row = row
        sequence.num_tokens = len(sequence.token_ids)
        insort(self.running, sequence, key=_by_order)
        request = sequence.request
        draft.admitted.append(
            RowAdmit(
                row=row,
                seq_id=sequence.seq_id,
                request_id=request.request_id,
                token_ids=tuple(sequence.token_ids),
                num_prompt_tokens=sequence.num_prompt_tokens,
                params=request.params,
                seed=sequence.seed,
                eos_token_ids=request.eos_token_ids,
                bad_words_ids=request.bad_words_ids,
                adapter=request.adapter,
                spans=request.prompt.spans,
                token_types=request.prompt.token_types,
            )
        )
        for group, block_ids in enumerate(sequence.block_ids):
            draft.block_updates.append(BlockUpdate(row, group, 0, tuple(block_ids)))

    # --- results

    def commit(self, step: Step, result: StepResult) -> list[SequenceDelta]:
        """Write a step's result back: append tokens, end what has ended, make full blocks findable."""
        deltas: list[SequenceDelta] = []
        plan, block_size = step.plan, self.info.block_size
        plain = not (result.logprobs or result.prompt_logprobs or result.pooled or result.errors)
        tokens = iter(result.token_ids)
        columns = zip(step.sequences, plan.rows, plan.starts, plan.counts, plan.samples, strict=True)
        for sequence, row, start, count, samples in columns:
            sequence.num_in_flight -= 1
            token_id = next(tokens) if samples else -1
            if sequence.state is SequenceState.FINISHED:
                continue  # a late row
            end = start + count
            if end // block_size > sequence.num_registered_blocks and sequence.state is SequenceState.RUNNING:
                self._register(sequence, row, end, result)
            if plain and samples and sequence.matcher is None and sequence.num_output_tokens:
                if ended := self._append(sequence, token_id):
                    deltas.append(ended)
                else:
                    deltas.append(SequenceDelta(sequence.request.request_id, sequence.index, (token_id,)))
            elif delta := self._commit_row(sequence, row, token_id if samples else None, end, result):
                deltas.append(delta)
        return deltas

    def _register(self, sequence: Sequence, row: int, end: int, result: StepResult) -> None:
        if row not in result.errors and not sequence.num_stale:
            self.kv_cache.register(sequence, end)

    def _append(self, sequence: Sequence, token_id: int) -> SequenceDelta | None:
        """Append a sampled token; the sequence's last delta when that ends it."""
        token_ids = sequence.token_ids
        token_ids.append(token_id)
        length = len(token_ids)
        if sequence.state is SequenceState.PREEMPTED:
            self.num_waiting_tokens += 1
        if token_id in sequence.stop_ids and length >= sequence.min_length:
            self.end(sequence, FinishReason.STOP)
        elif length >= sequence.limit:
            self.end(sequence, FinishReason.LENGTH)
        else:
            return None
        return _delta(sequence, (token_id,))

    def _append_constrained(self, sequence: Sequence, token_id: int) -> tuple[int, ...]:
        """Append a sampled token and those that the sequence's grammar then forces; the tokens appended."""
        matcher = sequence.matcher
        if self._append(sequence, token_id) or matcher is None:
            return (token_id,)
        if not matcher.accept((token_id,)):
            self.end(sequence, FinishReason.ERROR, "the sampled token does not follow the grammar")
            return ()
        if matcher.finished:
            self.end(sequence, FinishReason.STOP)
            return (token_id,)
        return (token_id, *self._force(sequence, matcher))

    def _force(self, sequence: Sequence, matcher: GrammarMatcher) -> list[int]:
        """Append the tokens that leave no choice, to be computed as one chunk instead of a step each.

        What steps in flight sample for those positions is dropped. Logprobs are of sampled tokens: who asks for them
        gets every token sampled.
        """
        params = sequence.request.params
        if isinstance(params, SamplingParams) and params.logprobs is not None:
            return []
        first = len(sequence.token_ids)
        forced, reason = _until_end(sequence, matcher.forced())
        if not forced or not matcher.accept(forced):
            return []
        sequence.num_stale += sequence.num_tokens - first
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, first)
        sequence.token_ids.extend(forced)
        sequence.num_tokens = len(sequence.token_ids)
        if sequence.state is SequenceState.PREEMPTED:
            self.num_waiting_tokens += len(forced)
        else:
            assert sequence.row is not None
            self._token_updates.append(TokenUpdate(sequence.row, first, tuple(forced)))
        reason = FinishReason.STOP if matcher.finished else reason
        if reason is not None:
            self.end(sequence, reason)
        return forced

    def _commit_row(
        self, sequence: Sequence, row: int, token_id: int | None, end: int, result: StepResult
    ) -> SequenceDelta | None:
        """The full road of one row: first tokens, logprobs, vectors and errors."""
        if row in result.errors:
            self.end(sequence, FinishReason.ERROR, result.errors[row])
            return _delta(sequence)
        if sequence.num_stale:
            sequence.num_stale -= 1
            return None
        is_first = token_id is not None and sequence.num_output_tokens == 0
        prompt_logprobs = result.prompt_logprobs.get(row)
        if row in result.pooled:
            self.end(sequence, FinishReason.STOP)
        elif token_id is None:
            if prompt_logprobs is None:
                return None
            return SequenceDelta(sequence.request.request_id, sequence.index, prompt_logprobs=prompt_logprobs)
        tokens = () if token_id is None else self._append_constrained(sequence, token_id)
        return _delta(sequence, tokens)._replace(
            logprobs=result.logprobs.get(row),
            prompt_logprobs=prompt_logprobs,
            pooled=result.pooled.get(row),
            num_cached_tokens=sequence.num_cached_tokens,
            queue_s=_queue_s(sequence) if is_first or row in result.pooled else None,
        )

    def fail(self, step: Step, error: str) -> list[SequenceDelta]:
        """The step raised: its sequences end with `error`, nothing it computed is believed."""
        deltas = []
        for sequence in step.sequences:
            sequence.num_in_flight -= 1
            if not sequence.is_finished:
                self.end(sequence, FinishReason.ERROR, error)
                deltas.append(_delta(sequence))
        return deltas

    def check(self) -> None:
        """Raise AssertionError unless every counter that must balance does."""
        held = [block_id for sequence in self.running for table in sequence.block_ids for block_id in table]
        self.kv_cache.pool.check(held)
        rows = [sequence.row for sequence in self.running]
        assert {*self._free_rows, *rows} == set(range(self.info.max_num_seqs)), "a row is lost"
        assert len(self._free_rows) + len(rows) == self.info.max_num_seqs, "a row is free twice"
        assert self.running == sorted(self.running, key=_by_order)
        live = sum(not sequence.is_finished for group in self.requests.values() for sequence in group)
        assert live == len(self.running) + len(self.waiting), "a sequence is lost"
        assert self.num_admitted == self.num_finished + live


def _may_use_cache(sequence: Sequence) -> bool:
    """A cached prefix has no logits and no hidden states: who wants those of the prompt computes it all."""
    params = sequence.request.params
    if isinstance(params, PoolingParams):
        return params.pooling == "last"
    return params.prompt_logprobs is None or sequence.num_scored_tokens >= sequence.num_prompt_tokens


def _queue_s(sequence: Sequence) -> float:
    assert sequence.first_scheduled_s is not None
    return max(0.0, sequence.first_scheduled_s - sequence.request.arrival_s)


def _delta(sequence: Sequence, token_ids: tuple[int, ...] = ()) -> SequenceDelta:
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


def _until_end(sequence: Sequence, forced: list[int]) -> tuple[list[int], FinishReason | None]:
    """Forced tokens up to a stop token or the sequence's limit, and the reason if they end it."""
    first = len(sequence.token_ids)
    for count, token_id in enumerate(forced, start=1):
        if token_id in sequence.stop_ids and first + count >= sequence.min_length:
            return forced[:count], FinishReason.STOP
        if first + count >= sequence.limit:
            return forced[:count], FinishReason.LENGTH
    return forced, None
