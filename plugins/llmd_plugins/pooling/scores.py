"""POST /score and /rerank: by a cross-encoder that reads both texts at once, or as the cosine of two vectors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.api.v1 import InvalidRequest, read_json_object
from llmd_plugins.pooling.call import Call, named, place
from llmd_plugins.pooling.fields import check_length, parse
from llmd_plugins.pooling.protocol import PairsRequest, RerankRequest, ScoreRequest
from llmd_plugins.pooling.vectors import prompt_name_of

if TYPE_CHECKING:
    from llmd.api.v1 import Prompt, ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# names of the two texts that vLLM takes too
_SPELLINGS = {"text_1": ("queries", "data_1"), "text_2": ("documents", "items", "data_2")}


class _Side:
    """One side of the pairs: the texts, the field they came in, and the kind of input they are."""

    def __init__(self, field: str, texts: Sequence[str], input_type: str | None = None) -> None:
        self.texts, self.input_type = texts, input_type
        self.names = [place(field, index, len(texts)) for index in range(len(texts))]


def score(context: ServerContext) -> Handler:
    """The handler of /score."""

    async def handle(request: web.Request) -> web.StreamResponse:
        given = _spelled(await read_json_object(request))
        for name in ("text_1", "text_2"):
            check_length(name, given.get(name), context.config.limits.max_inputs)
        body = parse(ScoreRequest, given)
        call = Call(context, request, body, "score")
        scores = await _scores(call, body, _Side("text_1", body.text_1), _Side("text_2", body.text_2))
        data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
        return call.answer(data=data)

    return handle


def _spelled(given: dict[str, Any]) -> dict[str, Any]:
    """The body with our names for its texts. Raises InvalidRequest where one comes under two names."""
    for name, others in _SPELLINGS.items():
        for other in others:
            if given.get(other) is None:
                continue
            if given.get(name) is not None:
                raise InvalidRequest(f"{other} is another name of {name}: give one", param=other, code="invalid_value")
            given = {**{key: value for key, value in given.items() if key != other}, name: given[other]}
    return given


def rerank(context: ServerContext) -> Handler:
    """The handler of /rerank and /v1/rerank, which give the documents back unless told otherwise."""
    return _rerank(context, gives_documents=True)


def rerank_v2(context: ServerContext) -> Handler:
    """The handler of /v2/rerank, which does not."""
    return _rerank(context, gives_documents=False)


def _rerank(context: ServerContext, *, gives_documents: bool) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        given = await read_json_object(request)
        check_length("documents", given.get("documents"), context.config.limits.max_inputs)
        body = parse(RerankRequest, given)
        call = Call(context, request, body, "rerank")
        query, documents = _Side("query", [body.query], "query"), _Side("documents", body.documents, "document")
        scores = await _scores(call, body, query, documents, body.max_tokens_per_doc)
        shows = gives_documents if body.return_documents is None else body.return_documents
        best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n or None]
        results = [_result(index, scores[index], body.documents[index] if shows else None) for index in best]
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        return call.answer(results=results, meta=meta)

    return handle


def _result(index: int, value: float, document: str | None) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "relevance_score": value}
    if document is not None:
        result["document"] = {"text": document}
    return result


async def _scores(call: Call, body: PairsRequest, first: _Side, second: _Side, max_length: int | None = None) -> list[float]:
    """A score for each pair; one first text goes with every second, of which `max_length` tokens are read."""
    if call.service.pooling.is_cross_encoder:
        return await _cross_scores(call, body, first, second, max_length)
    for name in ("use_activation", "instruction"):
        if getattr(body, name) is not None:
            message = f"{name} is for cross-encoders: this model's scores are cosines"
            raise InvalidRequest(message, param=name, code="invalid_value")
    return await _cosines(call, first, second, max_length)


async def _cross_scores(
    call: Call, body: PairsRequest, first: _Side, second: _Side, max_second_length: int | None
) -> list[float]:
    own = call.service.pooling
    params = own.score_params(body.use_activation)
    limit = body.truncate_prompt_tokens
    prompts: list[Prompt] = []
    for index, text in enumerate(second.texts):
        other = first.texts[index if len(first.texts) > 1 else 0]
        with named(second.names[index]):
            made = await own.pair(
                other, text, max_length=limit, max_other_length=max_second_length, instruction=body.instruction
            )
        prompts.append(made)
    return [float(scores[0]) for scores in await call.vectors(prompts, params, second.names)]


async def _cosines(call: Call, first: _Side, second: _Side, max_second_length: int | None) -> list[float]:
    own = call.service.pooling
    params = own.score_params()
    prompts: list[Prompt] = []
    for side, own_limit in ((first, None), (second, max_second_length)):
        prompt_name = prompt_name_of(own.defaults.prompts, side.input_type)
        limits = [limit for limit in (call.body.truncate_prompt_tokens, own_limit) if limit is not None]
        limit = min(limits, key=lambda limit: (limit == -1, limit), default=None)
        for name, text in zip(side.names, side.texts, strict=True):
            with named(name):
                prompts.append(await own.prompt(text, prompt_name=prompt_name, max_length=limit))
    vectors = await call.vectors(prompts, params, [*first.names, *second.names])
    left, right = vectors[: len(first.texts)], vectors[len(first.texts) :]
    return [float(left[index if len(left) > 1 else 0] @ vector) for index, vector in enumerate(right)]
