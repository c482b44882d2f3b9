"""Exactly one access record for each request of a real daemon, however it ended."""

import asyncio
import http.client
import json
import time
from collections import Counter
from urllib.parse import urlsplit

import aiohttp
import pytest
from daemons import Daemon

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_MANY = 120


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    environment = {"FAKE_STEP_S": "0.02", "LLMD_LOG__FORMAT": "json", "LLMD_SERVER__REQUEST_TIMEOUT_S": "1.0"}
    with Daemon("serve", "demo", cwd=tmp_path_factory.mktemp("daemon"), **environment) as running:
        yield running.ready()


def send(daemon, request_id, **fields):
    body = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True, **fields}
    return daemon.get("/v1/completions", body, **{"X-Request-Id": request_id, "traceparent": TRACE})


def leave(daemon, request_id, **fields):
    """Ask, and hang up once the answer has begun, or at once."""
    body = json.dumps({"prompt": "hello", "max_tokens": 100, "ignore_eos": True, **fields})
    connection = http.client.HTTPConnection(urlsplit(daemon.url).netloc, timeout=10)
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    connection.request("POST", "/v1/completions", body, headers)
    if fields.get("stream"):
        assert connection.getresponse().read(20)
    else:
        time.sleep(0.2)
    connection.close()


def records(daemon):
    entries = [json.loads(line) for line in daemon.lines]
    return [entry for entry in entries if entry["logger"] == "llmd.access"]


def test_one_record_each(daemon):
    assert send(daemon, "fine")[0] == 200
    assert send(daemon, "refused", max_tokens=-1)[0] == 400
    assert send(daemon, "late", max_tokens=100)[0] == 504
    assert daemon.get("/v1/nowhere", None, **{"X-Request-Id": "nowhere"})[0] == 404
    leave(daemon, "left-stream", stream=True)
    leave(daemon, "left-whole", n=2)
    for name in ("left-stream", "left-whole"):
        daemon.wait_for(f'"request_id":"{name}"')
    found = {entry["request_id"]: entry for entry in records(daemon)}
    assert Counter(entry["request_id"] for entry in records(daemon)) == Counter(list(found))
    expected = {"fine": 200, "refused": 400, "late": 504, "nowhere": 404, "left-stream": 499, "left-whole": 499}
    assert {name: found[name]["status"] for name in expected} == expected
    assert found["fine"]["finish_reasons"] == ["length"]
    assert found["fine"]["trace_id"] == TRACE.split("-")[1]
    assert found["late"]["finish_reasons"] == ["timeout"]
    for name in ("left-stream", "left-whole"):
        assert found[name]["client_gone"] is True
        assert set(found[name]["finish_reasons"]) == {"abort"}
        assert found[name]["output_tokens"] > 0
        assert found[name]["queue_ms"] >= 0
        assert found[name]["decode_ms"] > 0
        assert found[name]["steps"] > 0
    for name in ("fine", "late"):
        phases = found[name]["queue_ms"] + found[name]["prefill_ms"] + found[name]["decode_ms"]
        assert phases == pytest.approx(found[name]["e2e_ms"], abs=0.1)


def test_many_at_once_are_each_recorded_and_none_is_left(tmp_path):
    """A third streams to the end, a third leaves within it, a third is answered whole."""

    async def ask(session, index):
        stream = index % 3 != 2
        body = {"prompt": f"hello {index}", "max_tokens": 20, "ignore_eos": True, "stream": stream}
        async with session.post("/v1/completions", json=body, headers={"X-Request-Id": f"many-{index}"}) as answer:
            if index % 3 == 1:
                await answer.content.readany()
                answer.close()
            else:
                await answer.read()

    async def all_of_them(url):
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(url, connector=connector) as session:
            await asyncio.gather(*(ask(session, index) for index in range(_MANY)))

    environment = {"FAKE_STEP_S": "0.01", "LLMD_LOG__FORMAT": "json", "LLMD_SERVER__ADMIN_KEYS": '["adm"]'}
    with Daemon("serve", "demo", cwd=tmp_path, **environment) as daemon:
        daemon.ready()
        asyncio.run(all_of_them(daemon.url))
        status = wait_until_idle(daemon)
        page = daemon.get("/metrics")[1]
        assert daemon.stop() == 0
        found = [entry for entry in records(daemon) if entry["request_id"].startswith("many-")]
    assert Counter(entry["request_id"] for entry in found) == Counter([f"many-{index}" for index in range(_MANY)])
    assert Counter(entry["status"] for entry in found) == {200: 2 * _MANY // 3, 499: _MANY // 3}
    assert status["requests"] == []
    (usage,) = status["keys"]
    assert (usage["requests"], usage["running"]) == (_MANY, 0)
    assert usage["output_tokens"] == sum(entry["output_tokens"] for entry in found)
    assert f'llmd_key_requests_total{{key="(anonymous)",model_name="demo"}} {_MANY}.0' in page
    assert f'vllm:request_success_total{{engine="0",finished_reason="abort",model_name="demo"}} {_MANY // 3}.0' in page


def wait_until_idle(daemon):
    """The status once nothing runs."""
    for _ in range(100):
        status = daemon.get("/admin/status", None, Authorization="Bearer adm")[1]
        if not status["requests"] and status["models"][0]["stats"]["num_running"] == 0:
            return status
        time.sleep(0.1)
    raise AssertionError(status)
