"""Beam search over a ModelService: every running beam is a sequence of one token, its past found in the prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llmd.engine.params import BeamSearchParams, SamplingParams
from llmd.errors import InvalidRequest, LlmdError
from llmd.server.generate import ModelService
from llmd.text.beam_search import Beam, BeamSearch


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
        beams = search.running
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    _next_tokens(service, [*prompt, *beam.token_ids], step, f"{request_id}-{index}", arguments)
                )
                for index, beam in enumerate(beams)
            ]
        search.advance([task.result() for task in tasks])
    return search.results()


async def _next_tokens(
    service: ModelService, token_ids: list[int], step: SamplingParams, request_id: str, arguments: dict[str, Any]
) -> list[tuple[int, float]]:
    """The likeliest next tokens of one beam, with their log-probabilities."""
    stream = await service.generate(token_ids, step, request_id=request_id, **arguments)
    found: list[tuple[int, float]] = []
    try:
        async for deltas in stream:
            for delta in deltas:
                if delta.error is not None:
                    raise LlmdError(delta.error)
                for entry in delta.logprobs or ():
                    found = list(zip(entry.top_ids, entry.top_logprobs, strict=True))
    finally:
        stream.close()
    return found
