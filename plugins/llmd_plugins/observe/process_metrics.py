"""The process in /metrics: CPU, memory, file descriptors, garbage collection, how late the event loop and threads are."""

from __future__ import annotations

import gc
import threading
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import MetricsSpec, ServiceSpec, hookimpl

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_SAMPLE_S = 0.05  # 20 samples a second cost a few microseconds each
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


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


class Lag:
    """How much later than asked something came back: a histogram, and the worst since the last scrape."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self.worst_s = self.total_s = 0.0
        self.counts = [0] * (len(_BOUNDS) + 1)

    def note(self, late_s: float) -> None:
        """Count one sample."""
        late_s = max(late_s, 0.0)
        self.counts[bisect_left(_BOUNDS, late_s)] += 1
        self.total_s += late_s
        self.worst_s = max(self.worst_s, late_s)

    def collect(self) -> Iterator[Any]:
        """Both figures; the worst starts anew."""
        from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily

        rows, running = [], 0
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], self.counts, strict=True):
            running += count
            rows.append((bound, running))
        family = HistogramMetricFamily(f"llmd_{self.name}_seconds", self.text)
        family.add_metric([], rows, self.total_s)
        yield family
        worst_s, self.worst_s = self.worst_s, 0.0
        yield GaugeMetricFamily(f"llmd_{self.name}_max_seconds", f"{self.text} The worst since the last scrape.", worst_s)


async def watch_loop(lag: Lag) -> None:
    """Ask the event loop to be woken, and see how late it is."""
    import asyncio  # half of what loading all plugins took, where commands have no loop

    while True:
        asked_s = time.monotonic()
        await asyncio.sleep(_SAMPLE_S)
        lag.note(time.monotonic() - asked_s - _SAMPLE_S)


def watch_gil(lag: Lag, stopped: threading.Event) -> None:
    """Sleep in a thread of its own, which needs the GIL to go on, and see how late it is."""
    while not stopped.is_set():
        asked_s = time.monotonic()
        if stopped.wait(_SAMPLE_S):
            return
        lag.note(time.monotonic() - asked_s - _SAMPLE_S)


@asynccontextmanager
async def _watch(context: Any) -> AsyncIterator[None]:
    import asyncio

    loop_lag = Lag("event_loop_lag", "How much later than asked the event loop woke a task.")
    gil_lag = Lag("gil_lag", "How much later than asked a thread could go on.")
    stopped = threading.Event()
    thread = threading.Thread(target=watch_gil, args=(gil_lag, stopped), name="llmd-gil-lag", daemon=True)
    task = asyncio.create_task(watch_loop(loop_lag), name="llmd-loop-lag")
    for lag in (loop_lag, gil_lag):
        context.metrics.registry.register(lag)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        task.cancel()
        for lag in (loop_lag, gil_lag):
            context.metrics.registry.unregister(lag)


@hookimpl
def llmd_register_metrics() -> list[MetricsSpec]:
    """What is read from the system at a scrape."""
    return [MetricsSpec(name="process", summary="CPU, memory, descriptors, garbage collection", build=_register)]


@hookimpl
def llmd_register_services() -> list[ServiceSpec]:
    """What must be watched all the time."""
    return [ServiceSpec(name="lag", summary="watches how late the event loop and threads are", build=_watch)]
