"""Prometheus metrics: one registry per app, every figure under `llmd_` and, where vLLM has it, under vLLM's name too.

Gauges and token counters are read from the engines when somebody scrapes; what concerns one request is counted once,
when it ends. Nothing here runs per token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from llmd._version import __version__

if TYPE_CHECKING:
    from llmd.plugin.specs import RequestSummary

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Reading(NamedTuple):
    """One figure of EngineStats and how it is published."""

    name: str
    field: str
    help: str
    is_counter: bool = False
    has_twin: bool = False


READINGS = (
    Reading("num_requests_running", "num_running", "Sequences that hold a row.", has_twin=True),
    Reading("num_requests_waiting", "num_waiting", "Sequences that wait for a row.", has_twin=True),
    Reading("num_waiting_tokens", "num_waiting_tokens", "Prompt tokens of the sequences that wait."),
    Reading("kv_cache_usage_perc", "kv_usage", "Share of KV blocks in use, 0 to 1.", has_twin=True),
    Reading("kv_blocks", "num_blocks", "KV blocks of the pool."),
    Reading("kv_blocks_free", "num_free_blocks", "KV blocks that no sequence holds."),
    Reading("prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache.", True, True),
    Reading("prefix_cache_hits", "prefix_hits", "Prompt tokens found in the prefix cache.", True, True),
    Reading("num_preemptions", "num_preemptions", "Sequences that had to give their blocks back.", True, True),
    Reading("prompt_tokens", "num_prompt_tokens", "Prompt tokens computed.", True, True),
    Reading("generation_tokens", "num_output_tokens", "Tokens generated.", True, True),
    Reading("steps", "num_steps", "Steps run.", True),
    Reading("sequences_admitted", "admitted", "Sequences that entered the engine.", True),
    Reading("sequences_finished", "finished", "Sequences that ended.", True),
    Reading("schedule_seconds", "schedule_s", "Time spent planning steps.", True),
    Reading("commit_seconds", "commit_s", "Time spent taking results in.", True),
    Reading("publish_seconds", "publish_s", "Time spent making text of results.", True),
    Reading("wait_seconds", "wait_s", "Time spent waiting for the device.", True),
)

_FIRST_TOKEN_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_TOKEN_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000)

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From the request's arrival to its first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between two pieces of output of one sequence.", _TOKEN_S),
    "time_per_output_token_seconds": ("Mean time a token after the first, one figure a request.", _TOKEN_S),
    "e2e_request_latency_seconds": ("From arrival to the end.", _REQUEST_S),
    "request_queue_time_seconds": ("From arrival until a row was given.", _REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", _TOKENS),
}


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


class Metrics:
    """The figures of one app. `models` yields what is served, each with `names` and `engine.stats()`."""

    def __init__(self, models: Callable[[], Iterable[Any]] = tuple) -> None:
        self.models = models
        self.registry = CollectorRegistry()
        self._histograms: dict[tuple[str, str], Histogram] = {}
        self._success: dict[tuple[str, str], int] = {}
        self._http: dict[tuple[str, str, str], int] = {}
        self.registry.register(self)

    def render(self) -> bytes:
        """The page that Prometheus scrapes."""
        return generate_latest(self.registry)

    # --- counting

    def observe(self, summary: RequestSummary) -> None:
        """Count one ended request."""
        http = (summary.facts.get("method", ""), summary.route, str(summary.status))
        self._http[http] = self._http.get(http, 0) + 1
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
        yield from self._collect_engines()
        yield from self._collect_requests()
        yield from self._collect_histograms()
        info = GaugeMetricFamily("llmd_build_info", "The running version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info

    def _collect_engines(self) -> Iterator[Metric]:
        readings = [(model.names[0], model.engine.stats()) for model in self.models() if model.state != "loading"]
        for reading in READINGS:
            kind = CounterMetricFamily if reading.is_counter else GaugeMetricFamily
            for prefix, extra in _prefixes(reading.has_twin):
                family = kind(prefix + reading.name, reading.help, labels=["model_name", *extra])
                for name, stats in readings:
                    family.add_metric([name, *extra.values()], getattr(stats, reading.field))
                yield family

    def _collect_requests(self) -> Iterator[Metric]:
        for prefix, extra in _prefixes(True):
            labels = ["model_name", *extra, "finished_reason"]
            family = CounterMetricFamily(prefix + "request_success", "Sequences by how they ended.", labels=labels)
            for (model, reason), count in self._success.items():
                family.add_metric([model, *extra.values(), reason], count)
            yield family
        http = CounterMetricFamily("llmd_http_requests", "Requests by answer.", labels=["method", "route", "status"])
        for key, count in self._http.items():
            http.add_metric(list(key), count)
        yield http

    def _collect_histograms(self) -> Iterator[Metric]:
        for name, (text, _) in HISTOGRAMS.items():
            for prefix, extra in _prefixes(True):
                family = HistogramMetricFamily(prefix + name, text, labels=["model_name", *extra])
                for (metric, model), histogram in self._histograms.items():
                    if metric == name:
                        family.add_metric([model, *extra.values()], histogram.buckets(), histogram.total)
                yield family


def _prefixes(has_twin: bool) -> list[tuple[str, dict[str, str]]]:
    """Name prefix and further labels of each form in which a figure appears."""
    own: tuple[str, dict[str, str]] = ("llmd_", {})
    return [own, ("vllm:", {"engine": "0"})] if has_twin else [own]


def _observations(summary: RequestSummary) -> Iterator[tuple[str, Iterable[float]]]:
    """What one request adds to which histogram."""
    yield "e2e_request_latency_seconds", (summary.e2e_s,)
    yield "request_queue_time_seconds", (summary.queue_s,)
    yield "request_prompt_tokens", (summary.num_prompt_tokens,)
    yield "request_generation_tokens", (summary.num_output_tokens,)
    yield "inter_token_latency_seconds", summary.facts.get("itl_s", ())
    if summary.ttft_s is None:
        return
    yield "time_to_first_token_seconds", (summary.ttft_s,)
    num_later = summary.num_output_tokens - len(summary.finish_reasons)
    if num_later > 0:
        # with several sequences in step, each made its share of the tokens in the same time
        yield "time_per_output_token_seconds", ((summary.e2e_s - summary.ttft_s) * len(summary.finish_reasons) / num_later,)
