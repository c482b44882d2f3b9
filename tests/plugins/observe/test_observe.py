"""Log lines and figures about the daemon's work."""

from __future__ import annotations

import asyncio
import logging

from server.serving import FakeService, FakeStats, call, make_context, serving

from llmd.config import Config
from llmd.plugin.specs import RequestSummary
from llmd_plugins.observe import access_log, process_metrics, stats_log


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
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes", "python_gc_collections_total",
                 "llmd_event_loop_lag_seconds"):  # fmt: skip
        assert f"\n{name}" in text


def test_loop_lag_starts_anew_after_a_scrape():
    lag = process_metrics.LoopLag()
    lag.worst_s = 0.25
    assert [family.samples[0].value for family in lag.collect()] == [0.25]
    assert [family.samples[0].value for family in lag.collect()] == [0.0]


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
