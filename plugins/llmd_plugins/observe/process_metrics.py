"""The process in /metrics: CPU, memory, file descriptors, garbage collection, and how late the event loop is."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import MetricsSpec, ServiceSpec, hookimpl

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_SAMPLE_S = 0.5


class GarbageCollector:
    """Reads gc's own counters when somebody scrapes; nothing runs per collection."""

    def collect(self) -> Iterator[Any]:
        """Collections and freed objects by generation."""
        from prometheus_client.core import CounterMetricFamily

        collections = CounterMetricFamily("python_gc_collections", "Garbage collections.", labels=["generation"])
        freed = CounterMetricFamily("python_gc_objects_collected", "Objects freed by them.", labels=["generation"])
        for generation, stats in enumerate(gc.get_stats()):
            collections.add_metric([str(generation)], stats["collections"])
            freed.add_metric([str(generation)], stats["collected"])
        yield collections
        yield freed


def _register(registry: CollectorRegistry, context: Any) -> None:
    from prometheus_client import ProcessCollector

    ProcessCollector(registry=registry)
    registry.register(GarbageCollector())


class LoopLag:
    """How much later than asked the event loop came back, the worst since the last scrape."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def watch(self) -> None:
        """Ask to be woken, and see how late it is."""
        while True:
            asked_s = time.monotonic()
            await asyncio.sleep(_SAMPLE_S)
            self.worst_s = max(self.worst_s, time.monotonic() - asked_s - _SAMPLE_S)

    def collect(self) -> Iterator[Any]:
        """The figure, which starts anew."""
        from prometheus_client.core import GaugeMetricFamily

        worst_s, self.worst_s = self.worst_s, 0.0
        yield GaugeMetricFamily("llmd_event_loop_lag_seconds", "Worst lateness of the loop since the last scrape.", worst_s)


@asynccontextmanager
async def _watch_loop(context: Any) -> AsyncIterator[None]:
    lag = LoopLag()
    context.metrics.registry.register(lag)
    task = asyncio.create_task(lag.watch(), name="llmd-loop-lag")
    try:
        yield
    finally:
        task.cancel()
        context.metrics.registry.unregister(lag)


@hookimpl
def llmd_register_metrics() -> list[MetricsSpec]:
    """What is read from the system at a scrape."""
    return [MetricsSpec(name="process", summary="CPU, memory, descriptors, garbage collection", build=_register)]


@hookimpl
def llmd_register_services() -> list[ServiceSpec]:
    """What must be watched all the time."""
    return [ServiceSpec(name="loop_lag", summary="watches how late the event loop is", build=_watch_loop)]
