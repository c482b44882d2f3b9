"""Who computes what in the next step, and what becomes of its result. Plain ints; no clock but the one handed in.

There are no modes: a sequence has tokens computed and tokens known (or about to be sampled by a step in flight), and a
step lets the first catch up within the token budget. First the rows that need one token, so that a long prompt never
stalls them; then the rest of running prompts, in order; then waiting sequences. Blocks for all known tokens are taken when
a row is given, so only growth by one token can find the pool empty: then the last running sequence that is not yet part
of the step is preempted and recomputed later. The oldest is never preempted, hence every admitted sequence ends.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Iterable

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.executor import ExecutorInfo
from llmd.engine.ledger import Step, by_order
from llmd.engine.params import PoolingParams
from llmd.engine.planning import PlanDraft
from llmd.engine.queue import WaitingQueue
from llmd.engine.results import Results
from llmd.engine.sequence import Sequence, SequenceState
from llmd.engine.step import BlockUpdate, RowAdmit


class Scheduler(Results):
    """Plans steps; called by the engine on the loop thread only."""

    def __init__(self, config: SchedulerConfig, cache: CacheConfig, info: ExecutorInfo, waiting: WaitingQueue) -> None:
        super().__init__(config, cache, info, waiting)
        self.token_budget = config.max_num_batched_tokens  # of a step; lowered for a while where the device has no memory
        self.shared_tokens = config.shared_prompt_tokens  # prompt tokens of a step while several keys are served
        self.has_slow_steps = False  # set by the engine, as the two above
        self._was_alone = False  # the last step was its claims' alone
        self._step_ids = itertools.count()

    @property
    def is_shared(self) -> bool:
        """Whether several keys were served of late, by a policy that minds."""
        return self._fair is not None and self._fair.is_shared

    def schedule(self, now_s: float) -> Step | None:
        """Plan the next step and count it as computed; None when there is nothing to do until a step in flight ends."""
        draft = PlanDraft(self.token_budget)
        if len(self.waiting):
            self.adapters.begin()
        claims = self._make_room() if self._fair is not None and len(self.waiting) else ()
        self._was_alone = bool(claims) and self._admit_alone(draft, claims, now_s)
        prompts = [] if self._was_alone else self._schedule_decodes(draft)
        if self._fair is not None and not self._was_alone:
            prompts = self._share_step(draft, prompts, claims, now_s)
        self._go_on(draft, prompts)
        if self._free_rows and draft.budget and len(self.waiting) and not draft.has_preempted:
            self._admit(draft, self.waiting.ordered(now_s), now_s)
        if not draft.rows:
            return None
        if self._fair is not None:
            self._fair.charge(draft.sequences, draft.num_decodes, draft.counts)
        plan = draft.plan(next(self._step_ids), self._released, self._token_updates, with_masks=self._num_constrained > 0)
        self._released, self._token_updates = [], []
        self._num_planned += 1
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

    def _go_on(self, draft: PlanDraft, prompts: Iterable[Sequence]) -> None:
        """Compute more of running prompts, as far as the budget goes."""
        for sequence in prompts:
            if sequence.state is SequenceState.RUNNING and draft.budget and self._has_blocks(sequence, draft):
                draft.compute(sequence, min(sequence.num_tokens - sequence.num_computed_tokens, draft.budget))

    def _admit_alone(self, draft: PlanDraft, claims: Iterable[Sequence], now_s: float) -> bool:
        """On a slow device, give claims a step of their own, not two in a row; whether that was done.

        There a row costs what it costs, whatever runs beside it: the others lose nothing but one step's time.
        """
        if not self.has_slow_steps or self._was_alone or not self.running:
            return False
        self._admit(draft, claims, now_s)
        if draft.admitted:
            draft.budget = 0
        return bool(draft.admitted)

    def _share_step(
        self, draft: PlanDraft, prompts: list[Sequence], claims: Iterable[Sequence], now_s: float
    ) -> list[Sequence]:
        """Admit claims, after prompts of keys that have had less; the prompts that may go on behind them.

        A claim shares its step with no prompt of the other keys, and without one the step is short while several keys are
        served: either is what a key that comes has to wait for.
        """
        fair = self._fair
        assert fair is not None
        if len(prompts) > 1:
            prompts.sort(key=fair.rank)
        num_beyond = max(0, draft.budget - self.shared_tokens)
        if not fair.is_shared or self.info.needs_whole_prompts:
            num_beyond = 0
        draft.budget -= num_beyond
        if not claims:
            return prompts
        first = min(map(fair.rank, claims))
        ahead = [sequence for sequence in prompts if fair.rank(sequence) < first]
        self._go_on(draft, ahead)
        draft.budget += num_beyond
        num_before = len(draft.admitted)
        self._admit(draft, claims, now_s)
        if len(draft.admitted) > num_before:
            draft.budget = 0
        return prompts[len(ahead) :]

    def _make_room(self) -> list[Sequence]:
        """Preempt what gives way to the queue's claims, before the step is planned; the claims."""
        assert self._fair is not None
        claims = [claim for claim in self._fair.claims(self.info.max_num_seqs) if self.adapters.can_enter(claim)]
        num_blocks = self._num_spare
        for num_rows, claim in enumerate(claims, start=1):
            num_blocks += self.kv_cache.blocks_for(len(claim.token_ids))
            while (victim := self._victim(claim, num_rows, num_blocks)) is not None:
                self._preempt(victim)
        return claims

    def _victim(self, claim: Sequence, num_rows: int, num_blocks: int) -> Sequence | None:
        """Who gives way to a claim while so many rows and blocks are not free; None: they are, or nobody has too much."""
        assert self._fair is not None
        if len(self._free_rows) < num_rows:
            return self._fair.victim(claim, self.running, lambda sequence: 1, self.info.max_num_seqs)
        if self.kv_cache.pool.num_free < num_blocks:
            return self._fair.victim(claim, self.running, _num_blocks, self.kv_cache.pool.num_blocks)
        return None

    def _admit(self, draft: PlanDraft, candidates: Iterable[Sequence], now_s: float) -> None:
        """Give rows to waiting sequences in the queue's order, as far as rows, blocks and budget go."""
        for sequence in candidates:
            if not self._free_rows or draft.budget <= 0:
                return
            if not sequence.is_admissible or not self.adapters.can_enter(sequence):
                continue  # its leader or a step in flight comes first; neither waits for anything behind it
            if self.info.needs_whole_prompts and draft.rows and sequence.num_tokens > draft.budget:
                return
            num_spare = self._num_spare if self.running else 0
            if not self.kv_cache.admit(sequence, num_spare, use_cache=_may_use_cache(sequence)):
                return
            self._enter_row(sequence, self._free_rows.pop(), draft, now_s)
            self._copy_tail(sequence, draft)
            lacking = sequence.num_tokens - sequence.num_computed_tokens
            draft.compute(sequence, lacking if self.info.needs_whole_prompts else min(lacking, draft.budget))

    def _copy_tail(self, sequence: Sequence, draft: PlanDraft) -> None:
        """Spare a new sequence the end of a prompt that a sibling has computed, where its beginning was found.

        Copies come before all that the step computes, and behind what was planned before: whoever is admitted frees
        nothing any more, so the source is the sibling's until this plan is made, and a later plan may give it to anybody.
        """
        siblings = self.requests[sequence.request.request_id]
        if len(siblings) == 1 or sequence.num_output_tokens or not _may_use_cache(sequence):
            return
        source = next((sibling for sibling in siblings if sibling.has_prompt_kv), None)
        if source is not None and source.adapter is sequence.adapter:
            draft.block_copies += self.kv_cache.copy_tail(sequence, source)

    def _enter_row(self, sequence: Sequence, row: int, draft: PlanDraft, now_s: float) -> None:
        self._leave_queue(sequence)
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s, sequence.first_step = now_s, self._num_planned
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        sequence.state = SequenceState.RUNNING
        sequence.row = row
        sequence.num_tokens = len(sequence.token_ids)
        insort(self.running, sequence, key=by_order)
        request = sequence.request
        adapter = sequence.adapter
        if adapter is not None and (load := self.adapters.enter(sequence, now_s)) is not None:
            draft.adapter_loads.append(load)
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
                adapter_slot=adapter.slot if adapter is not None else None,
                spans=request.prompt.spans,
                token_types=request.prompt.token_types,
            )
        )
        for group, block_ids in enumerate(sequence.block_ids):
            draft.block_updates.append(BlockUpdate(row, group, 0, tuple(block_ids)))


def _may_use_cache(sequence: Sequence) -> bool:
    """A cached prefix has no logits and no hidden states: who wants those of the prompt computes it all."""
    params = sequence.request.params
    if isinstance(params, PoolingParams):
        return params.pooling == "last"
    return params.prompt_logprobs is None or sequence.num_scored_tokens >= sequence.num_prompt_tokens


def _num_blocks(sequence: Sequence) -> int:
    return sum(map(len, sequence.block_ids))
