"""A StepPlan being written."""

from __future__ import annotations

from llmd.engine.params import SamplingParams
from llmd.engine.sequence import Sequence
from llmd.engine.step import AdapterLoad, BlockCopy, BlockUpdate, RowAdmit, StepPlan, TokenUpdate


class PlanDraft:
    """A plan being written: columns for decodes are appended in the scheduler's inner loop, the rest by `compute`."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.has_preempted = False
        self.num_decodes = 0  # the first so many rows: one token each, sampled
        self.rows: list[int] = []
        self.starts: list[int] = []
        self.counts: list[int] = []  # of the rows after the decodes
        self.num_logits: list[int] = []
        self.samples: list[bool] = []
        self.sequences: list[Sequence] = []
        self.adapter_loads: list[AdapterLoad] = []
        self.admitted: list[RowAdmit] = []
        self.block_updates: list[BlockUpdate] = []
        self.block_copies: list[BlockCopy] = []

    def compute(self, sequence: Sequence, count: int) -> None:
        """Let `count` tokens of a sequence be computed; it samples if that reaches the last one it knows."""
        assert sequence.row is not None
        start = sequence.num_computed_tokens
        is_last = start + count == sequence.num_tokens
        self.budget -= count
        self.rows.append(sequence.row)
        self.starts.append(start)
        self.counts.append(count)
        self.num_logits.append(_wanted_logits(sequence, start, count, is_last))
        self.samples.append(is_last and sequence.samples)
        self.sequences.append(sequence)
        sequence.num_computed_tokens = start + count
        sequence.num_scored_tokens = max(sequence.num_scored_tokens, start + count)
        sequence.num_in_flight += 1
        if is_last and sequence.samples:
            sequence.num_tokens += 1

    def plan(self, step_id: int, released: list[int], token_updates: list[TokenUpdate], *, with_masks: bool) -> StepPlan:
        """The frozen plan."""
        ones = [1] * self.num_decodes
        samples = [True] * self.num_decodes + self.samples
        masked = [
            index
            for index, sequence in enumerate(self.sequences)
            if with_masks and sequence.matcher is not None and samples[index]
        ]
        return StepPlan(
            step_id=step_id,
            released=released,
            adapter_loads=self.adapter_loads,
            admitted=self.admitted,
            block_updates=self.block_updates,
            block_copies=self.block_copies,
            token_updates=token_updates,
            rows=self.rows,
            starts=self.starts,
            counts=ones + self.counts,
            num_logits=ones + self.num_logits,
            samples=samples,
            masked=masked,
        )


def _wanted_logits(sequence: Sequence, start: int, count: int, is_last: bool) -> int:
    """How many of the chunk's last positions want logits: one to sample, and those of the prompt not yet scored."""
    params = sequence.request.params
    wanted = int(is_last and sequence.samples)
    if isinstance(params, SamplingParams) and params.prompt_logprobs is not None and start < sequence.num_prompt_tokens:
        wanted = max(wanted, start + count - max(start, sequence.num_scored_tokens))
    return wanted
