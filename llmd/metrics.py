"""Prometheus metrics: one registry per app, every figure under `llmd_` and, where vLLM has it, under vLLM's name too.

Gauges and token counters are read from the engines when somebody scrapes; what concerns one request is counted once,
when it ends. Nothing here runs per token.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from llmd._version import __version__
from llmd.metrics_tables import ADAPTER_READINGS, ALWAYS_ZERO, HISTOGRAM_ALIASES, HISTOGRAMS, READINGS, STEP_TOKENS

if TYPE_CHECKING:
    from llmd.plugin.specs import RequestSummary

log = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_USAGE_ROWS = 512  # of each kind; who comes later is counted together
OTHER = "(other)"
ANONYMOUS = "(anonymous)"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # a client may invent others
_OWN: dict[str, str] = {}
_TWIN = {"engine": "0"}  # further labels of vLLM's names


class _Guard:
    """A collector that never raises: what it could not tell is left out, with one line in the log."""

    def __init__(self, collector: Any) -> None:
        self._collector = collector
        self._has_failed = False

    def __getattr__(self, name: str) -> Any:  # `describe`, where the collector has one
        return getattr(self._collector, name)

    def collect(self) -> list[Metric]:
        try:
            return list(self._collector.collect())
        except Exception as error:  # noqa: BLE001 - a plugin's figures must not cost all the others
            if not self._has_failed:
                log.warning("the collector %s raised %s: %s", type(self._collector).__name__, type(error).__name__, error)
            self._has_failed = True
            return []


class GuardedRegistry(CollectorRegistry):
    """A registry in which a collector that raises loses its own figures and no others."""

    def __init__(self) -> None:
        super().__init__()
        self._guards: dict[Any, _Guard] = {}

    def register(self, collector: Any) -> None:
        """Add a collector."""
        guard = _Guard(collector)
        super().register(guard)
        self._guards[collector] = guard

    def unregister(self, collector: Any) -> None:
        """Take a collector out."""
        super().unregister(self._guards.pop(collector))


class Histogram:
    """Counts per bucket, kept by hand: many values at once cost one bisection each and no lock."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, values: Iterable[float]) -> None:
        """Count the values."""
        for value in values:
            self.counts[bisect_left(self.bounds, value)] += 1
            self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts, as Prometheus wants them."""
        running, rows = 0, []
        for bound, count in zip([*map(str, map(float, self.bounds)), "+Inf"], self.counts, strict=True):
            running += count
            rows.append((bound, float(running)))
        return rows


class Usage:
    """What each key or adapter has used of each model: a bounded table."""

    FIELDS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")

    def __init__(self, what: str) -> None:
        self.what = what
        self.rows: dict[tuple[str, str], list[int]] = {}

    def count(self, name: str, summary: RequestSummary) -> None:
        """Add an ended request."""
        key = (name, summary.model)
        if key not in self.rows and len(self.rows) >= MAX_USAGE_ROWS:
            key = (OTHER, summary.model)
        row = self.rows.setdefault(key, [0, 0, 0, 0])
        row[0] += 1
        row[1] += summary.num_prompt_tokens
        row[2] += summary.num_cached_tokens
        row[3] += summary.num_output_tokens

    def table(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [
            {self.what: name, "model": model, **dict(zip(self.FIELDS, row, strict=True))}
            for (name, model), row in self.rows.items()
        ]

    def collect(self) -> Iterator[Metric]:
        """One counter for each column."""
        for index, field in enumerate(self.FIELDS):
            text = f"{field.replace('_', ' ').capitalize()} by {self.what}."
            family = CounterMetricFamily(f"llmd_{self.what}_{field}", text, labels=[self.what, "model_name"])
            for labels, row in self.rows.items():
                family.add_metric(labels, row[index])
            yield family


class Metrics:
    """The figures of one app. `models` yields what is served, each with `names` and `engine.stats()`."""

    def __init__(self, models: Callable[[], Iterable[Any]] = tuple) -> None:
        self.models = models
        self.registry: CollectorRegistry = GuardedRegistry()
        self._histograms: dict[tuple[str, str], Histogram] = {}
        self._success: dict[tuple[str, str], int] = {}
        self._http: dict[tuple[str, str, str], int] = {}
        self._usage = {"key": Usage("key"), "adapter": Usage("adapter")}
        self.registry.register(self)

    def render(self) -> bytes:
        """The page that Prometheus scrapes."""
        return generate_latest(self.registry)

    def usage(self, what: str) -> list[dict[str, Any]]:
        """Requests and tokens by "key" or by "adapter", and model."""
        return self._usage[what].table()

    # --- counting

    def observe(self, summary: RequestSummary) -> None:
        """Count one ended request."""
        method = summary.facts.get("method", "")
        http = (method if method in _METHODS else OTHER, summary.route, str(summary.status))
        self._http[http] = self._http.get(http, 0) + 1
        if summary.model:
            self._usage["key"].count(summary.key or ANONYMOUS, summary)
            if summary.adapter:
                self._usage["adapter"].count(summary.adapter, summary)
        if not summary.finish_reasons:
            return
        for reason in summary.finish_reasons:
            key = (summary.model, reason)
            self._success[key] = self._success.get(key, 0) + 1
        for name, values in _observations(summary):
            self._histogram(name, summary.model).observe(values)

    def _histogram(self, name: str, model: str) -> Histogram:
        key = (name, model)
        if key not in self._histograms:
            self._histograms[key] = Histogram(HISTOGRAMS[name][1])
        return self._histograms[key]

    # --- collecting

    def describe(self) -> list[Metric]:
        """Nothing is known before a model is: registration must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every family, in a stable order."""
        models = [model for model in self.models() if model.state != "loading"]
        readings = [(model.names[0], model.engine.stats()) for model in models]
        yield from _collect_readings(readings)
        yield from _collect_steps(readings)
        yield from _collect_adapters(models)
        yield from self._collect_requests()
        yield from self._collect_histograms()
        for usage in self._usage.values():
            yield from usage.collect()
        info = GaugeMetricFamily("llmd_build_info", "The running version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info

    def _collect_requests(self) -> Iterator[Metric]:
        for full_name, extra in _names("request_success", True):
            labels = ["model_name", *extra, "finished_reason"]
            family = CounterMetricFamily(full_name, "Sequences by how they ended.", labels=labels)
            for (model, reason), count in self._success.items():
                family.add_metric([model, *extra.values(), reason], count)
            yield family
        http = CounterMetricFamily("llmd_http_requests", "Requests by answer.", labels=["method", "route", "status"])
        for key, count in self._http.items():
            http.add_metric(list(key), count)
        yield http

    def _collect_histograms(self) -> Iterator[Metric]:
        for name, (text, _) in HISTOGRAMS.items():
            for full_name, extra in _names(name, True, HISTOGRAM_ALIASES.get(name, ())):
                family = HistogramMetricFamily(full_name, text, labels=["model_name", *extra])
                for (metric, model), histogram in self._histograms.items():
                    if metric == name:
                        family.add_metric([model, *extra.values()], histogram.buckets(), histogram.total)
                yield family


def _names(name: str, has_twin: bool, aliases: Sequence[str] = ()) -> list[tuple[str, dict[str, str]]]:
    """The full names under which a figure appears, each with its further labels."""
    twins = (name, *aliases) if has_twin else ()
    return [(f"llmd_{name}", _OWN), *((f"vllm:{twin}", _TWIN) for twin in twins)]


def _collect_readings(readings: Sequence[tuple[str, Any]]) -> Iterator[Metric]:
    for reading in READINGS:
        kind = CounterMetricFamily if reading.is_counter else GaugeMetricFamily
        for full_name, extra in _names(reading.name, reading.has_twin, reading.aliases):
            family = kind(full_name, reading.help, labels=["model_name", *extra])
            for name, stats in readings:
                family.add_metric([name, *extra.values()], getattr(stats, reading.field))
            yield family
    for twin, text in ALWAYS_ZERO.items():
        family = GaugeMetricFamily(f"vllm:{twin}", text, labels=["model_name", *_TWIN])
        for name, _ in readings:
            family.add_metric([name, *_TWIN.values()], 0)
        yield family


def _collect_steps(readings: Sequence[tuple[str, Any]]) -> Iterator[Metric]:
    """Tokens a step, which vLLM calls iteration_tokens_total."""
    for full_name, extra in (("llmd_step_tokens", _OWN), ("vllm:iteration_tokens_total", _TWIN)):
        family = HistogramMetricFamily(full_name, "Tokens computed by a step.", labels=["model_name", *extra])
        for name, stats in readings:
            family.add_metric([name, *extra.values()], _step_buckets(stats.step_sizes), stats.num_step_tokens)
        yield family


def _step_buckets(sizes: Sequence[int]) -> list[tuple[str, float]]:
    """Counts by powers of two as cumulative buckets."""
    rows = [(str(float(bound)), float(sum(sizes[: bound.bit_length()]))) for bound in STEP_TOKENS]
    return [*rows, ("+Inf", float(sum(sizes)))]


def _collect_adapters(models: Sequence[Any]) -> Iterator[Metric]:
    """vLLM's way to tell a router which adapters are in use: names in labels, the time as the value."""
    labels = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
    family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of running and waiting sequences.", labels=labels)
    for model in models:
        if model.state == "failed":
            continue  # perhaps before it had loaded
        running, waiting = model.engine.adapters()
        limit = str(model.engine.info.max_loras)
        family.add_metric([limit, ",".join(sorted(waiting)), ",".join(sorted(running))], time.time())
    yield family
    rows = [(info, model.names[0]) for model in models for info in model.adapters.list()[:MAX_USAGE_ROWS]]
    for name, (field, text) in ADAPTER_READINGS.items():
        counter = CounterMetricFamily(f"llmd_adapter_{name}", text, labels=["adapter", "model_name"])
        for info, model_name in rows:
            counter.add_metric([info.name, model_name], getattr(info, field))
        yield counter


def _observations(summary: RequestSummary) -> Iterator[tuple[str, Iterable[float]]]:
    """What one request adds to which histogram."""
    facts = summary.facts
    yield "e2e_request_latency_seconds", (summary.e2e_s,)
    yield "request_queue_time_seconds", (summary.queue_s,)
    yield "request_prompt_tokens", (summary.num_prompt_tokens,)
    yield "request_generation_tokens", (summary.num_output_tokens,)
    yield "inter_token_latency_seconds", facts.get("itl_s", ())
    yield "request_params_n", facts.get("n", ())
    yield "request_params_max_tokens", facts.get("max_tokens", ())
    if summary.prefill_s is not None and summary.decode_s is not None:
        yield "request_prefill_time_seconds", (summary.prefill_s,)
        yield "request_decode_time_seconds", (summary.decode_s,)
        yield "request_inference_time_seconds", (summary.prefill_s + summary.decode_s,)
    if summary.ttft_s is None:
        return
    yield "time_to_first_token_seconds", (summary.ttft_s,)
    num_later = summary.num_output_tokens - len(summary.finish_reasons)
    if num_later > 0:
        # with several sequences in step, each made its share of the tokens in the same time
        mean_s = (summary.e2e_s - summary.ttft_s) * len(summary.finish_reasons) / num_later
        yield "request_time_per_output_token_seconds", (mean_s,)
