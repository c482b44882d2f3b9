"""What LLM and AsyncLLM give back: vLLM's objects with vLLM's field names."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from llmd.offline.adapters import LoRARequest

T = TypeVar("T")


class RequestOutputKind(StrEnum):
    """What each output of a stream holds: all so far, only the news, or everything once at the end."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position; rank 1 is the likeliest."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """When what happened, in seconds of the monotonic clock."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None

    @property
    def time_in_queue(self) -> float | None:
        """Seconds before the first step."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    lora_request: LoRARequest | None = None

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuations."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    lora_request: LoRARequest | None = None


@dataclass(slots=True, kw_only=True)
class PoolingOutput:
    """What was pooled, as an array."""

    data: Any  # float32 [hidden_size], or [labels]


@dataclass(slots=True, kw_only=True)
class EmbeddingOutput:
    """A prompt's vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Its length."""
        return len(self.embedding)


@dataclass(slots=True, kw_only=True)
class ClassificationOutput:
    """A prompt's probabilities, in the order of the model's labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass(slots=True, kw_only=True)
class ScoringOutput:
    """How well two texts go together."""

    score: float


@dataclass(slots=True, kw_only=True)
class _Pooled(Generic[T]):
    """A prompt, as the tokens that were read, and what the model made of it."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


class PoolingRequestOutput(_Pooled[PoolingOutput]):
    """A prompt and what was pooled of its hidden states."""

    __slots__ = ()


class EmbeddingRequestOutput(_Pooled[EmbeddingOutput]):
    """A prompt and its vector."""

    __slots__ = ()


class ClassificationRequestOutput(_Pooled[ClassificationOutput]):
    """A prompt and its probabilities."""

    __slots__ = ()


class ScoringRequestOutput(_Pooled[ScoringOutput]):
    """Two texts and their score."""

    __slots__ = ()
