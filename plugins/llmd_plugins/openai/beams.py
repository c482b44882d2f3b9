"""use_beam_search: the best beams as the choices of an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import (
    BeamSearchParams,
    FinishReason,
    InvalidRequest,
    Prompt,
    Request,
    SamplingParams,
    TextDelta,
    beam_chat,
    beam_search,
    beam_text,
    refusal_of_end,
    shown,
    time_limit_s,
)
from llmd_plugins.openai.call import check_limits
from llmd_plugins.openai.constraints import structured_of

if TYPE_CHECKING:
    from llmd.api.v1 import ChatAnswer, ChatCall
    from llmd_plugins.openai.call import Call

# What a search of the likeliest continuations has no room for, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "presence_penalty": (0,), "min_tokens": (0,),
    "frequency_penalty": (0,), "repetition_penalty": (1,), "stop": ([],), "stop_token_ids": ([],), "bad_words": ([],),
    "logit_bias": ({},), "allowed_token_ids": (), "logprobs": (False,), "prompt_logprobs": (),
}  # fmt: skip


class BeamSource:
    """What a receipt and the usage are told of a prompt whose beams have been searched."""

    queued_s = finished_s = None
    sequences = ()

    def __init__(self, request_id: str, prompt: Sequence[int], num_output_tokens: int, adapter: str | None) -> None:
        given = Prompt(tuple(prompt))
        self.request = Request(request_id=request_id, prompt=given, params=SamplingParams(), adapter=adapter)
        self.num_output_tokens, self.num_cached_tokens = num_output_tokens, 0
        self.first_token_s = time.monotonic()

    def close(self) -> None:
        """All of it has been read."""


def _beam_params(call: Call, num_prompt_tokens: int, max_tokens: int | None) -> BeamSearchParams:
    """The request's fields as a search; raises InvalidRequest for those that a search has no room for."""
    body = call.body
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            message = f"{name} is not available with use_beam_search, got {shown(value)}"
            raise InvalidRequest(message, param=name, code="unsupported_parameter")
    if (structured := structured_of(body)) is not None:
        raise InvalidRequest(f"{structured[0]} is not available with use_beam_search", param=structured[0])
    limits = call.context.config.limits
    check_limits(limits, {"n": body.n, "best_of": body.best_of, "max_tokens": max_tokens})
    room = max(1, call.service.max_model_len - num_prompt_tokens)
    return BeamSearchParams(
        beam_width=body.best_of or call.num_choices,
        num_return=call.num_choices,
        max_tokens=max_tokens if max_tokens is not None else min(room, limits.max_output_tokens or room),
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        early_stopping=body.early_stopping or False,
        ignore_eos=bool(body.ignore_eos),
    )


@asynccontextmanager
async def _in_time(call: Call) -> AsyncIterator[None]:
    """A search is many requests to the engine, with one deadline."""
    try:
        async with asyncio.timeout(time_limit_s(call.context.config)):
            yield
    except TimeoutError:
        raise refusal_of_end(call.context, FinishReason.TIMEOUT, None) or TimeoutError from None


def _searched(call: Call, index: int, prompt: Sequence[int], ends: Sequence[tuple[Sequence[int], str]]) -> None:
    source = BeamSource(f"{call.id}-{index}", prompt, sum(len(token_ids) for token_ids, _ in ends), call.adapter)
    call.streams.append(source)
    call.receipt.streams.append(source)
    call.prompt_logprobs.append([])
    for _, reason in ends:
        call.receipt.finished(str(reason))


async def search_prompts(
    call: Call, prompts: Sequence[str | Sequence[int]], max_tokens: int | None, special: bool
) -> list[list[TextDelta]]:
    """The best beams of each prompt."""
    service, answers = call.service, []
    skip = call.body.skip_special_tokens is not False
    async with _in_time(call):
        for index, given in enumerate(prompts):
            prompt = await call.cut(given, special)
            if isinstance(prompt, str):
                prompt = await service.tokenizer.encode_async(prompt, add_special_tokens=special)
            params = _beam_params(call, len(prompt), max_tokens)
            beams = await beam_search(service, prompt, params, **call.options(index))
            row = [
                TextDelta(
                    call.id,
                    place,
                    beam_text(service, prompt, beam, skip_special_tokens=skip),
                    beam.token_ids,
                    finish_reason=FinishReason.STOP if beam.is_stopped else FinishReason.LENGTH,
                )
                for place, beam in enumerate(beams)
            ]
            _searched(call, index, prompt, [(delta.token_ids, str(delta.finish_reason)) for delta in row])
            answers.append(row)
    return answers


async def search_chat(call: Call, conversation: ChatCall, max_tokens: int | None) -> list[ChatAnswer]:
    """The best beams of a conversation."""
    if max_tokens is None:
        raise InvalidRequest("use_beam_search needs max_tokens", param="max_tokens")
    params = _beam_params(call, 0, max_tokens)
    async with _in_time(call):
        prompt, answers = await beam_chat(call.service, conversation, params, **call.options(0))
    _searched(call, 0, prompt, [(answer.token_ids, answer.finish_reason) for answer in answers])
    return answers
