"""Beam search: many prompts at once, each a search of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmd.engine.params import BeamSearchParams
from llmd.offline.adapters import make_ready
from llmd.server.beam import all_of, beam_search

if TYPE_CHECKING:
    from llmd.offline.jobs import Job
    from llmd.offline.running import Runner
    from llmd.server.generate import ModelService
    from llmd.text.beam_search import Beam


@dataclass(slots=True, kw_only=True)
class BeamSearchSequence:
    """A beam: the prompt's tokens and its own, their text, and the log-probability of its own."""

    tokens: list[int]
    text: str
    cum_logprob: float
    score: float  # with the length penalty: what they are ranked by
    finish_reason: str


@dataclass(slots=True, kw_only=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


async def search_all(
    service: ModelService, jobs: Sequence[Job], params: BeamSearchParams, runner: Runner
) -> list[BeamSearchOutput]:
    """Search for each prompt, some of them at a time. Raises the first error, the others are given up."""
    slots = asyncio.Semaphore(max(1, runner.max_in_flight // params.beam_width))

    await make_ready(service, [job.lora for job in jobs])

    async def run(job: Job) -> BeamSearchOutput:
        prompt, adapter = job.prompt.token_ids, job.lora.name if job.lora is not None else None
        async with slots:
            beams = await beam_search(service, prompt, params, request_id=runner.new_id(), adapter=adapter)
        return BeamSearchOutput(sequences=[_sequence(service, prompt, beam, params) for beam in beams])

    return await all_of([run(job) for job in jobs])


def _sequence(service: ModelService, prompt: Sequence[int], beam: Beam, params: BeamSearchParams) -> BeamSearchSequence:
    tokens = [*prompt, *beam.token_ids]
    return BeamSearchSequence(
        tokens=tokens,
        text=service.tokenizer.decode(tokens),
        cum_logprob=beam.score * len(beam.token_ids) ** params.length_penalty,
        score=beam.score,
        finish_reason="stop" if beam.is_stopped else "length",
    )
