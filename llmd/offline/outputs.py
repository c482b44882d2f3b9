"""What LLM gives back: vLLM's objects with vLLM's field names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmd.engine.step import TokenLogprobs
from llmd.server.generate import ModelService
from llmd.text.stream import RequestStream, TextDelta


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
    lora_request: None = None

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
    lora_request: None = None


@dataclass(slots=True, kw_only=True)
class EmbeddingOutput:
    """A prompt's vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Its length."""
        return len(self.embedding)


@dataclass(slots=True, kw_only=True)
class PoolingOutput:
    """A prompt's vector as an array."""

    data: Any  # float32 [hidden_size]


@dataclass(slots=True, kw_only=True)
class PoolingRequestOutput:
    """A prompt and what was pooled of its hidden states."""

    request_id: str
    outputs: PoolingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class EmbeddingRequestOutput:
    """A prompt and its vector."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class ClassificationOutput:
    """A prompt's probabilities, in the order of the model's labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass(slots=True, kw_only=True)
class ClassificationRequestOutput:
    """A prompt and its probabilities."""

    request_id: str
    outputs: ClassificationOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class ScoringOutput:
    """How well two texts go together."""

    score: float


@dataclass(slots=True, kw_only=True)
class ScoringRequestOutput:
    """Two texts, as the tokens that were read, and their score."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


def request_output(
    service: ModelService, stream: RequestStream, deltas: Sequence[TextDelta], prompt: str | None
) -> RequestOutput:
    """The whole of a finished stream."""
    request = stream.request
    rows = next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None)
    wants_prompt = getattr(request.params, "prompt_logprobs", None) is not None
    return RequestOutput(
        request_id=request.request_id,
        prompt=prompt,
        prompt_token_ids=list(request.prompt.token_ids),
        prompt_logprobs=[None, *_named(service, rows or [])] if wants_prompt else None,
        outputs=[_completion(service, delta) for delta in deltas],
        metrics=RequestMetrics(
            arrival_time=request.arrival_s,
            first_scheduled_time=stream.queued_s,
            first_token_time=stream.first_token_s,
            finished_time=stream.finished_s,
        ),
        num_cached_tokens=stream.num_cached_tokens,
    )


def pooling_output(stream: RequestStream, deltas: Sequence[TextDelta]) -> PoolingRequestOutput:
    """The vector of a finished stream."""
    return PoolingRequestOutput(
        request_id=stream.request.request_id,
        outputs=PoolingOutput(data=deltas[0].pooled),
        prompt_token_ids=list(stream.request.prompt.token_ids),
        num_cached_tokens=stream.num_cached_tokens,
    )


def embedding_output(pooled: PoolingRequestOutput) -> EmbeddingRequestOutput:
    """The same as a list of floats."""
    return EmbeddingRequestOutput(
        request_id=pooled.request_id,
        outputs=EmbeddingOutput(embedding=[float(value) for value in pooled.outputs.data]),
        prompt_token_ids=pooled.prompt_token_ids,
        num_cached_tokens=pooled.num_cached_tokens,
    )


def classification_output(pooled: PoolingRequestOutput) -> ClassificationRequestOutput:
    """The same as probabilities."""
    return ClassificationRequestOutput(
        request_id=pooled.request_id,
        outputs=ClassificationOutput(probs=[float(value) for value in pooled.outputs.data]),
        prompt_token_ids=pooled.prompt_token_ids,
        num_cached_tokens=pooled.num_cached_tokens,
    )


def scoring_output(score: float, *read: PoolingRequestOutput) -> ScoringRequestOutput:
    """The score of what was read: a pair at once, or two texts."""
    return ScoringRequestOutput(
        request_id=read[-1].request_id,
        outputs=ScoringOutput(score=score),
        prompt_token_ids=[token_id for part in read for token_id in part.prompt_token_ids],
        num_cached_tokens=sum(part.num_cached_tokens for part in read),
    )


def _completion(service: ModelService, delta: TextDelta) -> CompletionOutput:
    return CompletionOutput(
        index=delta.index,
        text=delta.text,
        token_ids=list(delta.token_ids),
        cumulative_logprob=None if delta.logprobs is None else sum(row.logprob for row in delta.logprobs),
        logprobs=None if delta.logprobs is None else _named(service, delta.logprobs),
        finish_reason=str(delta.finish_reason) if delta.finish_reason is not None else None,
        stop_reason=delta.stop_reason,
    )


def _named(service: ModelService, rows: Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
    """For each position the token that stands there, then the top ones, by id."""
    named = []
    for row in rows:
        entry = {row.token_id: Logprob(row.logprob, row.rank, service.logprob_token(row.token_id)[0])}
        for rank, (token_id, logprob) in enumerate(zip(row.top_ids, row.top_logprobs, strict=True), 1):
            if token_id not in entry:
                entry[token_id] = Logprob(logprob, rank, service.logprob_token(token_id)[0])
        named.append(entry)
    return named
