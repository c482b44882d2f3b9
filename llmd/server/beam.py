"""Beam search over a ModelService: every running beam is a sequence of one token, its past found in the prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from llmd.engine.params import BeamSearchParams, SamplingParams
from llmd.engine.step import FinishReason
from llmd.errors import InvalidRequest, LlmdError
from llmd.server.chat_plan import Plan, make_plan
from llmd.server.chat_types import TOOL_CALLS, ChatAnswer, ChatCall, add_call
from llmd.server.generate import ModelService
from llmd.text.beam_search import Beam, BeamSearch
from llmd.text.parsers import ParsedDelta

T = TypeVar("T")

_CUT_OFF = (FinishReason.ABORT, FinishReason.TIMEOUT)


async def beam_search(
    service: ModelService, prompt: Sequence[int], params: BeamSearchParams, *, request_id: str, **arguments: Any
) -> list[Beam]:
    """The best continuations of a prompt in token ids. `arguments` go to ModelService.generate (key, priority …).

    Raises InvalidRequest when prompt and max_tokens exceed the context.
    """
    if len(prompt) + params.max_tokens > service.max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: the context holds "
            f"{service.max_model_len}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    search = BeamSearch(params, service.eos_token_ids)
    step = SamplingParams(temperature=0.0, max_tokens=1, logprobs=search.num_candidates, ignore_eos=True, detokenize=False)
    while not search.is_done:
        steps = [
            _next_tokens(service, [*prompt, *beam.token_ids], step, f"{request_id}-{index}", arguments)
            for index, beam in enumerate(search.running)
        ]
        search.advance(await all_of(steps))
    return search.results()


async def all_of(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of calls that run at once; the first error is raised, and the others are cancelled before."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def beam_chat(
    service: ModelService, call: ChatCall, params: BeamSearchParams, *, request_id: str, **arguments: Any
) -> tuple[list[int], list[ChatAnswer]]:
    """A conversation's prompt in token ids and its best answers, read by the model's parsers.

    Of `call.params` only how the text is shown counts. Raises InvalidRequest for a call that needs a grammar.
    """
    plan = await make_plan(service, call)
    if plan.is_constrained or plan.thinking is not None:
        raise InvalidRequest(
            "beam search cannot be combined with a forced call or a thinking budget", param="use_beam_search"
        )
    prompt = plan.prompt_ids
    if prompt is None:
        prompt = await service.tokenizer.encode_async(plan.prompt, add_special_tokens=plan.add_special_tokens)
    beams = await beam_search(service, prompt, params, request_id=request_id, **arguments)
    skip = plan.params.skip_special_tokens
    texts = [beam_text(service, prompt, beam, skip_special_tokens=skip) for beam in beams]
    return list(prompt), [
        _answer(plan, index, text, beam.token_ids, FinishReason.STOP if beam.is_stopped else FinishReason.LENGTH)
        for index, (beam, text) in enumerate(zip(beams, texts, strict=True))
    ]


def _answer(plan: Plan, index: int, text: str, token_ids: Sequence[int], reason: FinishReason) -> ChatAnswer:
    """A whole text as an answer, read as a stream of it would be."""
    parser = plan.parser(is_thinking=False, after_thinking=False)
    pieces = [ParsedDelta(text)] if parser is None else [*parser.feed(text, token_ids), *parser.finish()]
    answer = ChatAnswer(index, token_ids=list(token_ids), finish_reason=reason)
    for piece in pieces:
        if piece.tool_call is not None and (plan.parallel or not piece.tool_call.index):
            add_call(answer.tool_calls, piece.tool_call)
        answer.content += piece.content
        answer.reasoning += piece.reasoning if plan.include_reasoning else ""
    if answer.tool_calls and reason is FinishReason.STOP:
        answer.finish_reason = TOOL_CALLS
    return answer


def beam_text(service: ModelService, prompt: Sequence[int], beam: Beam, *, skip_special_tokens: bool = True) -> str:
    """What a beam adds to the text of its prompt, without the token that ended it."""
    detokenizer = service.tokenizer.detokenizer(prompt, skip_special_tokens=skip_special_tokens)
    return detokenizer.feed(beam.token_ids[:-1] if beam.is_stopped else beam.token_ids) + detokenizer.finish()


async def _next_tokens(
    service: ModelService, token_ids: list[int], step: SamplingParams, request_id: str, arguments: dict[str, Any]
) -> list[tuple[int, float]]:
    """The likeliest next tokens of one beam, with their log-probabilities."""
    stream = await service.generate(token_ids, step, request_id=request_id, **arguments)
    found: list[tuple[int, float]] = []
    try:
        async for deltas in stream:
            for delta in deltas:
                if delta.error is not None or delta.finish_reason in _CUT_OFF:
                    raise LlmdError(delta.error or f"the search of a beam was ended: {delta.finish_reason}")
                for entry in delta.logprobs or ():
                    found = list(zip(entry.top_ids, entry.top_logprobs, strict=True))
    finally:
        stream.close()
    return found
