"""A throughput line for each model every `log.stats_interval_s` seconds in which it worked."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from llmd.api.v1 import ServiceSpec, hookimpl

logger = logging.getLogger("llmd.stats")


def line(name: str, before: Any, now: Any, seconds: float) -> str:
    """Rates since the reading before, and how things stand now."""
    queried = now.prefix_queries - before.prefix_queries
    hit = 100 * (now.prefix_hits - before.prefix_hits) / queried if queried else 0.0
    return (
        f"{name}: prompt {(now.num_prompt_tokens - before.num_prompt_tokens) / seconds:.1f} tok/s, "
        f"output {(now.num_output_tokens - before.num_output_tokens) / seconds:.1f} tok/s, "
        f"running {now.num_running}, waiting {now.num_waiting}, KV {100 * now.kv_usage:.1f} %, prefix hits {hit:.1f} %"
    )


def has_worked(before: Any, now: Any) -> bool:
    """Whether anything was computed between two readings."""
    return now.num_steps != before.num_steps


async def _report(context: Any, interval_s: float) -> None:
    import asyncio  # commands that load plugins have no loop

    readings: dict[str, Any] = {}
    before_s = time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        now_s = time.monotonic()
        for model in context.models():
            if model.state == "loading":
                continue
            name, now = model.names[0], model.engine.stats()
            before = readings.get(name)
            if before is not None and has_worked(before, now):
                logger.info("%s", line(name, before, now, now_s - before_s))
            readings[name] = now
        before_s = now_s


@asynccontextmanager
async def _run(context: Any) -> AsyncIterator[None]:
    import asyncio

    interval_s = context.config.log.stats_interval_s
    if not interval_s:
        yield
        return
    task = asyncio.create_task(_report(context, interval_s), name="llmd-stats-log")
    try:
        yield
    finally:
        task.cancel()


@hookimpl
def llmd_register_services() -> list[ServiceSpec]:
    """The reporter."""
    return [ServiceSpec(name="stats_log", summary="throughput lines while there is work", build=_run)]
