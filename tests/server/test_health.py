"""Alive, ready, version, figures: also while models load and when an engine has failed."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from server.serving import FakeService, call, make_context, serving

from llmd.engine.executor import LoadProgress
from llmd.metrics import Histogram
from llmd.metrics_tables import HISTOGRAMS, READINGS


async def get(url, path):
    answer = await call(url, "GET", path)
    return answer.status, answer.json(), answer.headers


async def test_ready_follows_the_load():
    service = FakeService(state="loading")
    context = make_context(service, state="loading", services={}, progress=LoadProgress("downloading", 0.1))
    async with serving(context) as url:
        status, body, headers = await get(url, "/ready")
        assert status == 503
        assert (body["phase"], body["percentage"]) == ("downloading", 10.0)
        assert headers["Retry-After"] == "1"
        assert (await get(url, "/health"))[0] == 200
        assert (await get(url, "/v1/models"))[1]["data"] == []
        context.services.update(dict.fromkeys(service.names, service))
        status, body, _ = await get(url, "/ready")
        assert (status, body["phase"], body["percentage"]) == (503, "shard 3/8", 37.5)
        assert (await get(url, "/v1/models"))[1]["data"][0]["max_model_len"] is None
        service.state, context.state = "ready", "ready"
        status, body, _ = await get(url, "/ready")
        assert status == 200
        assert body["models"][0]["percentage"] == 100.0
        context.state = "draining"
        assert (await get(url, "/ready"))[1]["status"] == "draining"


async def test_health_tells_of_a_failed_engine():
    service = FakeService()
    async with serving(make_context(service)) as url:
        service.engine.failure = RuntimeError("device lost")
        status, body, _ = await get(url, "/health")
        assert (status, body) == (503, {"status": "failed", "models": ["fake"]})


async def test_health_tells_of_an_engine_without_a_sign_of_life():
    service = FakeService()
    async with serving(make_context(service)) as url:
        assert (await get(url, "/health"))[0] == 200
        service.engine.pulse.why_not_alive = lambda: "no step ended and nothing moved for 9.0 s"
        status, body, _ = await get(url, "/health")
        assert (status, body["status"], body["models"]) == (503, "stalled", ["fake"])
        assert "9.0 s" in body["reasons"]["fake"]


async def test_ready_tells_the_queue():
    async with serving(make_context()) as url:
        row = (await get(url, "/ready"))[1]["models"][0]
        assert row["queue"] == {"running": 0, "waiting": 0, "waiting_tokens": 0}


async def test_version():
    from llmd import __version__

    async with serving(make_context()) as url:
        assert (await get(url, "/version"))[1] == {"version": __version__}


async def test_metrics_have_every_family_under_both_names():
    async with serving(make_context()) as url:
        answer = await call(url, "GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.body.decode())}
    for reading in READINGS:
        assert families["llmd_" + reading.name].samples[0].labels == {"model_name": "fake"}
        if reading.has_twin:
            assert families["vllm:" + reading.name].samples[0].labels == {"model_name": "fake", "engine": "0"}
    for name in HISTOGRAMS:
        assert {"llmd_" + name, "vllm:" + name} <= set(families)
    assert families["llmd_kv_cache_usage_perc"].samples[0].value == 0.25
    assert families["vllm:prefix_cache_hits"].samples[0].value == 5


async def test_metrics_while_loading():
    async with serving(make_context(FakeService(state="loading"))) as url:
        assert (await call(url, "GET", "/metrics")).status == 200


def test_histogram():
    histogram = Histogram((0.1, 1))
    histogram.observe([0.05, 0.1, 0.5, 2])
    assert histogram.buckets() == [("0.1", 2.0), ("1.0", 3.0), ("+Inf", 4.0)]
    assert histogram.total == 2.65


async def test_a_broken_listener_breaks_no_answer(caplog):
    def broken(summary):
        raise RuntimeError("listener")

    async with serving(make_context(request_finished=broken)) as url:
        assert (await get(url, "/version"))[0] == 200
    assert "was not recorded" in caplog.text
