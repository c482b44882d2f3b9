"""When requests are sent: arrivals at a rate, a bound on how many are under way, and the progress bar."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from llmd_plugins.commands.bench.client import Target, ask
from llmd_plugins.commands.bench.datasets import BenchRequest
from llmd_plugins.commands.bench.stats import RequestResult

if TYPE_CHECKING:
    from aiohttp import ClientSession


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How fast requests come. Burstiness 1 is a Poisson process, below it they come in bursts, above it evenly."""

    request_rate: float = float("inf")  # a second; inf: all at once
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0


def arrivals(num: int, load: Load) -> list[float]:
    """Seconds from the start at which each request is sent, spread by a gamma process over num / rate in all, as in vLLM."""
    if load.request_rate == float("inf"):
        return [0.0] * num
    rng, now, times = random.Random(load.seed), 0.0, []
    for _ in range(num):
        now += rng.gammavariate(load.burstiness, 1 / (load.request_rate * load.burstiness))
        times.append(now)
    return [time * (num / load.request_rate) / now for time in times]


async def run_load(
    requests: Sequence[BenchRequest],
    load: Load,
    send: Callable[[BenchRequest], Awaitable[RequestResult]],
    *,
    on_done: Callable[[RequestResult], None] = lambda result: None,
) -> tuple[list[RequestResult], float]:
    """Send all; their results in order, and the seconds from the first send to the last answer."""
    gate = asyncio.Semaphore(load.max_concurrency or len(requests) or 1)

    async def one(request: BenchRequest) -> RequestResult:
        async with gate:
            result = await send(request)
        on_done(result)
        return result

    start, tasks = perf_counter(), list[asyncio.Task[RequestResult]]()
    async with asyncio.TaskGroup() as group:
        for request, at in zip(requests, arrivals(len(requests), load), strict=True):
            if (delay := start + at - perf_counter()) > 0:
                await asyncio.sleep(delay)
            tasks.append(group.create_task(one(request)))
    return [task.result() for task in tasks], perf_counter() - start


async def wait_until_ready(session: ClientSession, target: Target, request: BenchRequest, timeout_s: float) -> str:
    """Ask for one token until it works; empty, or what was wrong last."""
    probe, until = BenchRequest(request.prompt, request.num_prompt_tokens, 1), perf_counter() + timeout_s
    while True:
        result = await ask(session, target, probe)
        if result.is_ok or perf_counter() >= until or result.error.startswith("HTTP 4"):
            return result.error
        await asyncio.sleep(1.0)
