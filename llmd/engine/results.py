"""What becomes of a step's result: tokens appended, sequences ended, full blocks made findable, or all of it undone."""

from __future__ import annotations

from llmd.engine.grammar import GrammarMatcher
from llmd.engine.ledger import Ledger, Step, by_order, last_delta
from llmd.engine.params import SamplingParams
from llmd.engine.sequence import Sequence, SequenceState
from llmd.engine.step import FinishReason, SequenceDelta, StepResult, TokenUpdate


class Results(Ledger):
    """Writes results back."""

    def commit(self, step: Step, result: StepResult) -> list[SequenceDelta]:
        """Write a step's result back: append tokens, end what has ended, make full blocks findable."""
        deltas: list[SequenceDelta] = []
        plan, block_size = step.plan, self.info.block_size
        self._num_committed = plan.step_id + 1
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
        return last_delta(sequence, (token_id,))

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
        if self.kv_cache.has_state and sequence.num_computed_tokens > first:
            self._preempt(sequence)  # steps in flight bring its state beyond the tokens that stand
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
            return last_delta(sequence)
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
        return last_delta(sequence, tokens)._replace(
            logprobs=result.logprobs.get(row),
            prompt_logprobs=prompt_logprobs,
            pooled=result.pooled.get(row),
            num_cached_tokens=sequence.num_cached_tokens,
            queue_s=_queue_s(sequence) if is_first or row in result.pooled else None,
        )

    def fail(self, step: Step, error: str) -> list[SequenceDelta]:
        """The step raised: its sequences end with `error`, nothing it computed is believed."""
        deltas = []
        self._num_committed = step.plan.step_id + 1
        for sequence in step.sequences:
            sequence.num_in_flight -= 1
            if not sequence.is_finished:
                self.end(sequence, FinishReason.ERROR, error)
                deltas.append(last_delta(sequence))
        self.adapters.undo(step.plan.adapter_loads)
        return deltas

    def roll_back(self, steps: list[Step]) -> None:
        """None of these steps, all that are in flight, counts: preempt their sequences, to be computed again.

        Where in a step memory was lacking nobody knows, so nothing that it was to write is believed: slots of adapters are
        filled again, and rows that only got tokens begin again.
        """
        again: dict[int, Sequence] = {}
        updated = {update.row for step in steps for update in step.plan.token_updates}
        again.update((sequence.seq_id, sequence) for sequence in self.running if sequence.row in updated)
        for step in reversed(steps):
            plan = step.plan
            self._num_committed = max(self._num_committed, plan.step_id + 1)
            columns = zip(step.sequences, plan.starts, plan.counts, plan.num_logits, strict=True)
            for sequence, start, count, num_logits in columns:
                sequence.num_in_flight -= 1
                sequence.num_stale = 0
                if num_logits:  # what was asked of the prompt is asked again
                    sequence.num_scored_tokens = min(sequence.num_scored_tokens, start + count - num_logits)
                if sequence.state is SequenceState.RUNNING:
                    again[sequence.seq_id] = sequence
        for sequence in sorted(again.values(), key=by_order, reverse=True):
            self._preempt(sequence)
        for step in steps:
            self.adapters.undo(step.plan.adapter_loads)


def _queue_s(sequence: Sequence) -> float:
    assert sequence.first_scheduled_s is not None
    return max(0.0, sequence.first_scheduled_s - sequence.request.arrival_s)


def _until_end(sequence: Sequence, forced: list[int]) -> tuple[list[int], FinishReason | None]:
    """Forced tokens up to a stop token or the sequence's limit, and the reason if they end it."""
    first = len(sequence.token_ids)
    for count, token_id in enumerate(forced, start=1):
        if token_id in sequence.stop_ids and first + count >= sequence.min_length:
            return forced[:count], FinishReason.STOP
        if first + count >= sequence.limit:
            return forced[:count], FinishReason.LENGTH
    return forced, None
