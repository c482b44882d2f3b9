"""From streams of text to the outputs that callers get: whole ones, and piece by piece."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmd.engine.step import FinishReason, TokenLogprobs
from llmd.errors import AdapterError
from llmd.offline.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    PoolingOutput,
    PoolingRequestOutput,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    ScoringOutput,
    ScoringRequestOutput,
)

if TYPE_CHECKING:
    from llmd.offline.adapters import LoRARequest
    from llmd.offline.jobs import Job
    from llmd.server.generate import ModelService
    from llmd.text.stream import RequestStream, TextDelta

logger = logging.getLogger(__name__)


# --- text


class Answer:
    """The answer to one prompt as it grows; `add` gives the output for each piece of news."""

    def __init__(self, service: ModelService, stream: RequestStream, job: Job, kind: RequestOutputKind) -> None:
        self._service, self._stream, self._text, self._kind = service, stream, job.text, kind
        self._lora = job.lora
        self._prompt_rows: dict[int, list[TokenLogprobs]] = {}  # by sequence: each of them scores the prompt
        self._has_told_prompt = False
        self._completions: dict[int, CompletionOutput] = {}

    def add(self, deltas: Sequence[TextDelta]) -> RequestOutput | None:
        """What the caller gets for this news; None while an answer is only wanted whole. Raises what ended the request."""
        check_ended(self._stream, deltas)
        for delta in deltas:
            self._prompt_rows.setdefault(delta.index, []).extend(delta.prompt_logprobs or ())
        news = [_completion(self._service, delta, self._lora) for delta in deltas]
        for completion in news:
            self._completions[completion.index] = _joined(self._completions.get(completion.index), completion)
        if self._kind is RequestOutputKind.DELTA:
            return self._output(news)
        if self._kind is RequestOutputKind.FINAL_ONLY and not self._is_finished:
            return None
        return self._output(self._in_order())

    def aborted(self) -> RequestOutput:
        """The last output of a request that was aborted."""
        reason = str(FinishReason.ABORT)
        for index in range(self._stream.request.num_sequences):
            known = self._completions.get(index) or CompletionOutput(index=index, text="", token_ids=[])
            self._completions[index] = replace(known, finish_reason=known.finish_reason or reason)
        whole = self._in_order()
        if self._kind is RequestOutputKind.DELTA:
            return self._output([replace(one, text="", token_ids=[], logprobs=None) for one in whole])
        return self._output(whole)

    @property
    def _is_finished(self) -> bool:
        ended = sum(completion.finish_reason is not None for completion in self._completions.values())
        return ended == self._stream.request.num_sequences

    def _in_order(self) -> list[CompletionOutput]:
        return [self._completions[index] for index in sorted(self._completions)]

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Those of the prompt once all are there; among the news only the first time."""
        request = self._stream.request
        if getattr(request.params, "prompt_logprobs", None) is None:
            return None
        wanted = len(request.prompt) - 1
        rows = next((rows for rows in self._prompt_rows.values() if len(rows) == wanted), None)
        if rows is None or (self._kind is RequestOutputKind.DELTA and self._has_told_prompt):
            return None
        self._has_told_prompt = True
        return [None, *_named(self._service, rows)]

    def _output(self, completions: list[CompletionOutput]) -> RequestOutput:
        stream, request = self._stream, self._stream.request
        return RequestOutput(
            request_id=request.request_id,
            prompt=self._text,
            prompt_token_ids=list(request.prompt.token_ids),
            prompt_logprobs=self._prompt_logprobs(),
            outputs=completions,
            finished=self._is_finished,
            metrics=RequestMetrics(
                arrival_time=request.arrival_s,
                first_scheduled_time=stream.queued_s,
                first_token_time=stream.first_token_s,
                finished_time=stream.finished_s,
            ),
            num_cached_tokens=stream.num_cached_tokens,
            lora_request=self._lora,
        )


def request_output(service: ModelService, stream: RequestStream, job: Job, deltas: Sequence[TextDelta]) -> RequestOutput:
    """The whole of a finished stream."""
    output = Answer(service, stream, job, RequestOutputKind.CUMULATIVE).add(deltas)
    assert output is not None  # only FINAL_ONLY waits
    return output


def check_ended(stream: RequestStream, deltas: Iterable[TextDelta]) -> None:
    """Raise what ended the whole request; what ended one sequence is logged, and its finish_reason says "error"."""
    if stream.error is not None:
        raise stream.error
    for delta in deltas:
        if delta.finish_reason is FinishReason.REFUSED:
            raise AdapterError(delta.error or "the adapter cannot be loaded", param="lora_request")
        if delta.finish_reason is FinishReason.ERROR:
            logger.warning("request %s, sequence %d ended with an error: %s", delta.request_id, delta.index, delta.error)


def _completion(service: ModelService, delta: TextDelta, lora: LoRARequest | None) -> CompletionOutput:
    return CompletionOutput(
        index=delta.index,
        text=delta.text,
        token_ids=list(delta.token_ids),
        cumulative_logprob=None if delta.logprobs is None else sum(row.logprob for row in delta.logprobs),
        logprobs=None if delta.logprobs is None else _named(service, delta.logprobs),
        finish_reason=str(delta.finish_reason) if delta.finish_reason is not None else None,
        stop_reason=delta.stop_reason,
        lora_request=lora,
    )


def _joined(so_far: CompletionOutput | None, news: CompletionOutput) -> CompletionOutput:
    """Both as a new object: the caller may keep what it was given before."""
    if so_far is None:
        return news
    has_logprobs = so_far.logprobs is not None or news.logprobs is not None
    return replace(
        news,
        text=so_far.text + news.text,
        token_ids=[*so_far.token_ids, *news.token_ids],
        cumulative_logprob=(so_far.cumulative_logprob or 0) + (news.cumulative_logprob or 0) if has_logprobs else None,
        logprobs=[*(so_far.logprobs or ()), *(news.logprobs or ())] if has_logprobs else None,
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


# --- vectors, classes, scores


def pooling_output(
    service: ModelService, stream: RequestStream, job: Job, deltas: Sequence[TextDelta]
) -> PoolingRequestOutput:
    """The array of a finished stream."""
    check_ended(stream, deltas)
    return PoolingRequestOutput(
        request_id=stream.request.request_id,
        outputs=PoolingOutput(data=deltas[0].pooled),
        prompt_token_ids=list(job.prompt.token_ids),
        num_cached_tokens=stream.num_cached_tokens,
    )


def embedding_output(pooled: PoolingRequestOutput) -> EmbeddingRequestOutput:
    """The same as a list of floats."""
    outputs = EmbeddingOutput(embedding=_floats(pooled))
    return EmbeddingRequestOutput(outputs=outputs, **_read(pooled))


def classification_output(pooled: PoolingRequestOutput) -> ClassificationRequestOutput:
    """The same as probabilities."""
    return ClassificationRequestOutput(outputs=ClassificationOutput(probs=_floats(pooled)), **_read(pooled))


def scoring_output(score: float, *read: PoolingRequestOutput) -> ScoringRequestOutput:
    """The score of what was read: a pair at once, or two texts."""
    return ScoringRequestOutput(outputs=ScoringOutput(score=score), **_read(*read))


def _floats(pooled: PoolingRequestOutput) -> list[float]:
    return [float(value) for value in pooled.outputs.data]


def _read(*parts: PoolingRequestOutput) -> dict[str, Any]:
    """What was read for an output, in one part or two."""
    return {
        "request_id": parts[-1].request_id,
        "prompt_token_ids": [token_id for part in parts for token_id in part.prompt_token_ids],
        "num_cached_tokens": sum(part.num_cached_tokens for part in parts),
    }
