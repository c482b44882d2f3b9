"""An engine over a fake executor, and a reader of what it publishes."""

from __future__ import annotations

import asyncio
import contextlib

from fakes import FakeExecutor, greedy

from llmd.config import CacheConfig, HealthConfig, SchedulerConfig
from llmd.engine.engine import Engine
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason
from llmd_plugins.scheduling.fcfs import FcfsQueue


class Sink:
    """Collects deltas by request."""

    def __init__(self) -> None:
        self.deltas: dict[str, list] = {}
        self.changed = asyncio.Event()

    def publish(self, deltas) -> None:
        for delta in deltas:
            self.deltas.setdefault(delta.request_id, []).append(delta)
        self.changed.set()

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [token for delta in self.deltas.get(request_id, ()) if delta.index == index for token in delta.token_ids]

    async def end(self, request_id: str, count: int = 1) -> list[FinishReason]:
        async with asyncio.timeout(10):
            while True:
                reasons = [delta.finish_reason for delta in self.deltas.get(request_id, ()) if delta.finish_reason]
                if len(reasons) >= count:
                    return reasons
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def running(executor: FakeExecutor | None = None, health: HealthConfig | None = None, **scheduler):
    sink = Sink()
    executor = executor or FakeExecutor()
    config = SchedulerConfig(
        **{"max_num_seqs": executor.device.info.max_num_seqs, "max_num_batched_tokens": 64, **scheduler}
    )
    engine = Engine(executor, config, CacheConfig(), waiting=FcfsQueue(), publish=sink.publish, health=health)
    phases = []
    await engine.start(phases.append)
    assert phases
    try:
        yield engine, sink, executor
    finally:
        await engine.stop()
        assert executor.stopped


def request(name: str, length: int = 5, **changes) -> Request:
    params = changes.pop("params", None) or greedy(**changes.pop("sampling", {"max_tokens": 6}))
    return Request(request_id=name, prompt=Prompt(tuple(range(1, length + 1))), params=params, **changes)
