"""The daemon in /metrics: its state, the configuration it runs with, its plugins, and what its models read from memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import MetricsSpec, hookimpl

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from llmd.api.v1 import Config

_STATES = ("loading", "ready", "draining", "failed")


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits that change with the configuration, its secrets aside: they are not part of its repr."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:12]


class DaemonCollector:
    """Reads the daemon when somebody scrapes."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._hashed: tuple[Any, str] = (None, "")

    def describe(self) -> list[Metric]:
        """Nothing is collected while the server is put together."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        yield _states("llmd_state", "Where the daemon is in its life.", [((), self._context.state)], [])
        models = [((model.names[0],), model.state) for model in self._context.models()]
        yield _states("llmd_model_state", "Where a model is in its life.", models, ["model_name"])
        yield self._config_info()
        yield self._plugins()
        serving = [model for model in self._context.models() if model.state == "ready"]
        yield from _life_families(serving)
        yield from _memory_families(serving)
        yield _cache_config_info(self._context)

    def _config_info(self) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        config = self._context.config
        if self._hashed[0] is not config:
            self._hashed = (config, config_hash(config))
        family = GaugeMetricFamily("llmd_config_info", "The configuration that runs, by its hash.", labels=["hash"])
        family.add_metric([self._hashed[1]], 1)
        return family

    def _plugins(self) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        rows = self._context.plugin_status() if self._context.plugin_status is not None else []
        family = GaugeMetricFamily("llmd_plugins", "Plugins by what became of them.", labels=["state"])
        for state in ("loaded", "disabled", "incompatible", "failed"):
            family.add_metric([state], sum(row["state"] == state for row in rows))
        return family


def _states(name: str, text: str, rows: Sequence[tuple[tuple[str, ...], str]], labels: Sequence[str]) -> Metric:
    """A gauge with one series for each state, of which one is 1."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=[*labels, "state"])
    for values, current in rows:
        for state in _STATES:
            family.add_metric([*values, state], float(state == current))
    return family


def _life_families(models: list[Any]) -> Iterator[Metric]:
    """What /health and the watchdog go by."""
    from prometheus_client.core import GaugeMetricFamily

    stalled = GaugeMetricFamily("llmd_stalled_seconds", "Seconds without any sign of life.", labels=["model_name"])
    patience = GaugeMetricFamily("llmd_hang_seconds", "So many of them are a hang: the process ends.", labels=["model_name"])
    for model in models:
        stalled.add_metric([model.names[0]], model.engine.pulse.stalled_s)
        patience.add_metric([model.names[0]], model.engine.pulse.patience_s)
    yield from (stalled, patience)


def _memory_families(models: list[Any]) -> Iterator[Metric]:
    """Bytes that steps had to read, for the share of the memory bandwidth that they achieved (MBU)."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    read = CounterMetricFamily("llmd_read_bytes", "Weights and KV that steps read.", labels=["model_name"])
    weights = GaugeMetricFamily("llmd_weights_bytes", "Size of the weights.", labels=["model_name"])
    kv = GaugeMetricFamily("llmd_kv_pool_bytes", "Size of the KV pool.", labels=["model_name"])
    bandwidth = GaugeMetricFamily(
        "llmd_memory_bandwidth_bytes_per_second", "Of the device, as measured.", labels=["model_name"]
    )
    utilization = GaugeMetricFamily(
        "llmd_memory_bandwidth_utilization", "Share of it that the last decode steps achieved (MBU).", labels=["model_name"]
    )
    account = GaugeMetricFamily(
        "llmd_device_memory_bytes", "Where the device's memory goes, as told at the start.", labels=["model_name", "part"]
    )
    for model in models:
        name, info, stats = model.names[0], model.engine.info, model.engine.stats()
        for row in info.facts.get("memory", ()):
            if row["is_bytes"]:
                account.add_metric([name, row["name"]], row["value"])
        read.add_metric([name], stats.read_bytes)
        if stats.memory_utilization is not None:
            utilization.add_metric([name], stats.memory_utilization)
        weights.add_metric([name], info.weights_bytes)
        kv.add_metric([name], info.kv_bytes)
        if measured := info.facts.get("memory_bandwidth"):
            bandwidth.add_metric([name], measured)
    yield from (read, weights, kv, account, bandwidth, utilization)


def _cache_config_info(context: Any) -> Metric:
    """What vLLM tells of its cache, for dashboards that reckon with the number of blocks."""
    from prometheus_client.core import GaugeMetricFamily

    cache = context.config.cache
    labels = [
        "model_name", "engine", "block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization",
        "num_gpu_blocks", "num_cpu_blocks",
    ]  # fmt: skip
    family = GaugeMetricFamily("vllm:cache_config_info", "How the KV cache is set up.", labels=labels)
    for model in context.models():
        if model.state == "ready":
            info = model.engine.info
            values = (model.names[0], "0", info.block_size, cache.kv_cache_dtype, cache.enable_prefix_caching,
                      cache.gpu_memory_utilization, info.num_blocks, 0)  # fmt: skip
            family.add_metric([str(value) for value in values], 1)
    return family


def _register(registry: CollectorRegistry, context: Any) -> None:
    registry.register(DaemonCollector(context))


@hookimpl
def llmd_register_metrics() -> list[MetricsSpec]:
    """What is read from the daemon at a scrape."""
    return [MetricsSpec(name="daemon", summary="state, configuration, plugins, bytes read", build=_register)]
