"""Log lines and figures about the daemon's work."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from types import SimpleNamespace

import pytest
from server.serving import FakeService, FakeStats, call, make_context, serving

from llmd.config import Config
from llmd.model.memory_account import MemoryAccount
from llmd.plugin.specs import RequestSummary
from llmd_plugins.observe import access_log, daemon_metrics, process_metrics, stats_log


def summary(**changes):
    values = {
        "request_id": "abc", "model": "demo", "key": "key-1", "route": "/v1/completions", "status": 200,
        "finish_reasons": ("stop",), "num_prompt_tokens": 5, "num_cached_tokens": 2, "num_output_tokens": 7,
        "queue_s": 0.001, "ttft_s": 0.02, "e2e_s": 0.3, "facts": {"method": "POST"},
    }  # fmt: skip
    return RequestSummary(**{**values, **changes})


def test_access_log_writes_one_line(caplog):
    with caplog.at_level(logging.INFO, "llmd.access"):
        access_log.llmd_request_finished(summary())
    (record,) = caplog.records
    text = record.getMessage()
    assert text == (
        "POST /v1/completions 200 300.0ms model=demo key=key-1 tokens=5(2 cached)+7 queue=1.0ms ttft=20.0ms finish=stop"
    )
    assert record.request_id == "abc"
    assert record.output_tokens == 7


def test_access_log_tells_errors_and_hushes_probes(caplog):
    with caplog.at_level(logging.INFO, "llmd.access"):
        access_log.llmd_request_finished(summary(route="/health", model="", key="", finish_reasons=()))
        assert not caplog.records
        access_log.llmd_request_finished(summary(status=400, facts={"method": "POST", "error": "n must be 1"}))
    assert "error='n must be 1'" in caplog.text


async def test_access_log_obeys_the_configuration():
    config = Config.model_validate({"log": {"access": False}})
    (spec,) = access_log.llmd_register_services()
    async with spec.build(make_context(config=config)):
        assert access_log.logger.disabled
    assert not access_log.logger.disabled


async def test_process_metrics_are_in_metrics():
    specs = {
        "metric_specs": process_metrics.llmd_register_metrics(),
        "service_specs": process_metrics.llmd_register_services(),
    }
    async with serving(make_context(**specs)) as url:
        text = (await call(url, "GET", "/metrics")).body.decode()
    for name in (
        "process_cpu_seconds_total", "process_resident_memory_bytes", "python_gc_collections_total",
        "llmd_event_loop_lag_seconds_count", "llmd_event_loop_lag_max_seconds", "llmd_gil_lag_seconds_count",
    ):  # fmt: skip
        assert f"\n{name}" in text


def test_the_worst_lag_starts_anew_after_a_scrape():
    lag = process_metrics.Lag("event_loop_lag", "Late.")
    for late_s in (0.0004, 0.003, 0.25, -0.001):
        lag.note(late_s)
    histogram, worst = lag.collect()
    buckets = {sample.labels["le"]: sample.value for sample in histogram.samples if sample.name.endswith("_bucket")}
    assert (buckets["0.001"], buckets["0.005"], buckets["+Inf"]) == (2, 3, 4)
    assert worst.samples[0].value == 0.25
    assert next(iter(list(lag.collect())[1].samples)).value == 0.0


async def test_a_blocked_loop_is_late():
    lag = process_metrics.Lag("event_loop_lag", "Late.")
    task = asyncio.create_task(process_metrics.watch_loop(lag))
    await asyncio.sleep(0.01)
    time.sleep(0.3)
    await asyncio.sleep(0.1)
    task.cancel()
    assert lag.worst_s > 0.15


def test_a_thread_that_cannot_go_on_is_late(monkeypatch):
    stopped, lag = threading.Event(), process_metrics.Lag("gil_lag", "Late.")
    clock = iter([0.0, 0.45, 1.0])

    def monotonic():
        return next(clock)

    monkeypatch.setattr(process_metrics, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(stopped, "wait", lambda seconds: lag.worst_s > 0)
    process_metrics.watch_gil(lag, stopped)
    assert lag.worst_s == pytest.approx(0.4)


async def test_daemon_metrics_are_in_metrics():
    rows = [{"state": "loaded"}, {"state": "loaded"}, {"state": "failed"}]
    context = make_context(metric_specs=daemon_metrics.llmd_register_metrics(), plugin_status=lambda: rows)
    account = MemoryAccount(device="fake", weights_bytes=4096, block_bytes=8, num_blocks=2, max_model_len=1, max_num_seqs=1)
    context.models()[0].engine.info.facts["memory"] = account.plain()
    async with serving(context) as url:
        text = (await call(url, "GET", "/metrics")).body.decode()
        before = daemon_metrics.config_hash(context.config)
        context.config = Config.model_validate({"log": {"level": "debug"}})
        later = (await call(url, "GET", "/metrics")).body.decode()
    lines = text.splitlines()
    assert 'llmd_state{state="ready"} 1.0' in lines
    assert 'llmd_state{state="failed"} 0.0' in lines
    assert 'llmd_model_state{model_name="fake",state="ready"} 1.0' in lines
    assert 'llmd_plugins{state="loaded"} 2.0' in lines
    assert 'llmd_plugins{state="failed"} 1.0' in lines
    assert 'llmd_memory_bandwidth_bytes_per_second{model_name="fake"} 1e+09' in lines
    assert 'llmd_device_memory_bytes{model_name="fake",part="weights"} 4096.0' in lines
    assert 'llmd_device_memory_bytes{model_name="fake",part="KV pool"} 16.0' in lines
    assert 'part="tokens"' not in text
    assert 'llmd_memory_bandwidth_utilization{model_name="fake"} 0.625' in lines
    assert 'llmd_read_bytes_total{model_name="fake"} 4000.0' in lines
    assert f'llmd_config_info{{hash="{before}"}} 1.0' in lines
    assert before not in later
    assert any(line.startswith("vllm:cache_config_info{") and 'num_gpu_blocks="64"' in line for line in lines)


def test_the_config_hash_tells_no_secret():
    keys = [Config.model_validate({"server": {"api_keys": [key]}}) for key in ("one", "two")]
    assert daemon_metrics.config_hash(keys[0]) == daemon_metrics.config_hash(keys[1])
    assert len(daemon_metrics.config_hash(keys[0])) == 12


def test_stats_line():
    before = FakeStats(num_steps=1)
    now = FakeStats(
        num_steps=9, num_prompt_tokens=100, num_output_tokens=50, prefix_queries=40, prefix_hits=15, num_running=2
    )
    assert not stats_log.has_worked(before, before)
    assert stats_log.has_worked(before, now)
    text = stats_log.line("demo", before, now, 10.0)
    assert text == "demo: prompt 10.0 tok/s, output 5.0 tok/s, running 2, waiting 0, KV 25.0 %, prefix hits 33.3 %"


async def test_stats_are_told_only_while_there_is_work(caplog):
    service = FakeService()
    steps = iter(range(1000))
    service.engine.stats = lambda: FakeStats(num_steps=min(next(steps), 3))
    config = Config.model_validate({"log": {"stats_interval_s": 0.01}})
    (spec,) = stats_log.llmd_register_services()
    with caplog.at_level(logging.INFO, "llmd.stats"):
        async with spec.build(make_context(service, config=config)):
            await asyncio.sleep(0.15)
    assert 1 <= len(caplog.records) <= 3
