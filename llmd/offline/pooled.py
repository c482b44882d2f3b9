"""What LLM and AsyncLLM share of scores: which jobs make them, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llmd.offline.results import scoring_output

if TYPE_CHECKING:
    from llmd.offline.jobs import Job, JobMaker
    from llmd.offline.outputs import PoolingRequestOutput, ScoringRequestOutput
    from llmd.server.generate import ModelService

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Scoring:
    """Two texts a score: read at once by a cross-encoder, or one by one, and the cosine of the vectors taken.

    One text on the left goes with every text on the right; otherwise there are as many of each.
    """

    left: list[str]
    right: list[str]
    is_cross_encoder: bool

    @classmethod
    def of(cls, service: ModelService, data_1: str | Sequence[str], data_2: str | Sequence[str]) -> Scoring:
        """Raises ValueError where the numbers of texts do not fit."""
        left, right = ([data] if isinstance(data, str) else list(data) for data in (data_1, data_2))
        if len(left) not in (1, len(right)):
            raise ValueError(f"{len(left)} texts cannot be scored with {len(right)}: give one, or as many")
        return cls(left, right, service.pooling.is_cross_encoder)

    @property
    def texts(self) -> list[str]:
        """All there is to read."""
        return [*self.left, *self.right]

    def jobs(self, maker: JobMaker, service: ModelService, max_length: int | None) -> list[Job]:
        """What the engine is asked."""
        params = service.pooling.score_params()
        if self.is_cross_encoder:
            pairs = list(zip(self._repeated(self.left), self.right, strict=True))
            return maker.pairs(pairs, params, max_length=max_length)
        return maker.pooling(self.texts, params, max_length=max_length)

    def scores(self, pooled: list[PoolingRequestOutput]) -> list[ScoringRequestOutput]:
        """What the engine's answers mean."""
        if self.is_cross_encoder:
            return [scoring_output(float(output.outputs.data[0]), output) for output in pooled]
        firsts, seconds = self._repeated(pooled[: len(self.left)]), pooled[len(self.left) :]
        pairs = zip(firsts, seconds, strict=True)
        return [scoring_output(float(one.outputs.data @ two.outputs.data), one, two) for one, two in pairs]

    def _repeated(self, items: list[T]) -> list[T]:
        return items * (len(self.right) if len(self.left) == 1 else 1)
