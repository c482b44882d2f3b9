"""Beam search as bookkeeping: which continuations live on, which have finished, when there is nothing left to gain.

The same choices as Hugging Face's `generate(num_beams=…)`, which is what users compare with. It knows no engine: who
drives it asks for each running beam's likeliest next tokens and hands them to `advance`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from llmd.engine.params import BeamSearchParams


class Beam(NamedTuple):
    """A continuation and its log-probability; a finished one's score has the length penalty in it."""

    score: float
    token_ids: tuple[int, ...]
    is_stopped: bool = False  # by an end-of-sequence token, its last


class BeamSearch:
    """The state of one search."""

    def __init__(self, params: BeamSearchParams, eos_token_ids: Sequence[int]) -> None:
        self._params = params
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self.running = [Beam(0.0, ())]
        self.finished: list[Beam] = []  # the best `beam_width`, best first
        self._length = 0

    @property
    def num_candidates(self) -> int:
        """Next tokens wanted of each running beam: enough to go on with when every likely one ends its beam."""
        return max(2, 1 + len(self._eos)) * self._params.beam_width

    @property
    def is_done(self) -> bool:
        """Whether no running beam is worth going on with."""
        if not self.running:
            return True
        if len(self.finished) < self._params.beam_width:
            return False
        return self._params.early_stopping is True or self._best_possible() <= self.finished[-1].score

    def _best_possible(self) -> float:
        """The score that the best running beam may reach, reckoned as `early_stopping` says."""
        params, length = self._params, self._length
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = params.max_tokens
        return self.running[0].score / length**params.length_penalty

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Take a step: for each running beam, in order, its likeliest next tokens with their log-probabilities."""
        self._length += 1
        extended = [
            Beam(beam.score + logprob, (*beam.token_ids, token_id), token_id in self._eos)
            for beam, nexts in zip(self.running, candidates, strict=True)
            for token_id, logprob in nexts
        ]
        width = self._params.beam_width
        best = heapq.nlargest(self.num_candidates, extended, key=lambda beam: beam.score)
        at_limit = self._length >= self._params.max_tokens
        ended = [beam for beam in best[:width] if beam.is_stopped or at_limit]
        self.running = [] if at_limit else [beam for beam in best if not beam.is_stopped][:width]
        penalty = self._length**self._params.length_penalty
        scored = [beam._replace(score=beam.score / penalty) for beam in ended]
        self.finished = heapq.nlargest(width, [*self.finished, *scored], key=lambda beam: beam.score)

    def results(self) -> list[Beam]:
        """The best finished beams, best first."""
        return self.finished[: self._params.num_return or self._params.beam_width]
