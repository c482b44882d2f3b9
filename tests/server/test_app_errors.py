"""Every way a request can be wrong: OpenAI's shape, the right status, nothing of our insides, others unharmed."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import logging

import aiohttp
import pytest
from server.serving import FakeService, call, make_config, make_context, serving

from llmd.errors import NotReady, Overloaded
from llmd.plugin.specs import RouteSpec

CHAT = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "hi"}]}
JSON = {"Content-Type": "application/json"}


async def post(url, data, headers=None, path=CHAT):
    async with aiohttp.ClientSession() as session, session.post(url + path, data=data, headers=headers or JSON) as answer:
        return answer.status, await answer.json(), answer.headers


def check_shape(body):
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)


async def raw(url, request: bytes, limit: int = 1 << 16) -> bytes:
    """Send bytes as they are; what comes back until the server closes or is quiet."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(limit), 3)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b"null", 400, "invalid_json"),
        (b'{"messages": NaN}', 400, "invalid_json"),
        (b'{"messages": "\xff\xfe"}', 400, "invalid_json"),
        (b'{"messages": "\\ud800"}', 400, None),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"metadata":' * 10_000 + b"1" + b"}" * 10_000, 400, "invalid_json"),
        (b'{"metadata":' * 300 + b"1" + b"}" * 300, 400, "invalid_json"),
        (b'{"model": "nope", "messages": [{"role": "user", "content": "hi"}]}', 404, "model_not_found"),
    ],
)
async def test_bad_bodies(data, status, code):
    async with serving(make_context()) as url:
        got, body, _ = await post(url, data)
    check_shape(body)
    assert got == status
    if code is not None:
        assert body["error"]["code"] == code


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "image/png"])
async def test_wrong_content_type_is_415(kind):
    async with serving(make_context()) as url:
        status, body, _ = await post(url, json.dumps(GOOD), {"Content-Type": kind})
    check_shape(body)
    assert (status, body["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("tail", ["}", "]"])
async def test_large_bodies_leave_the_collector_on(tail):
    body = json.dumps({**GOOD, "metadata": {"x": ["y"] * 100_000}})[:-1] + tail
    async with serving(make_context()) as url:
        status, _, _ = await post(url, body.encode())
    assert status == (200 if tail == "}" else 400)
    assert gc.isenabled()


async def test_json_with_charset_or_suffix_is_taken():
    async with serving(make_context()) as url:
        for kind in ("application/json; charset=utf-8", "application/vnd.api+json"):
            status, _, _ = await post(url, json.dumps(GOOD), {"Content-Type": kind})
            assert status == 200


async def test_unknown_path_and_wrong_method():
    async with serving(make_context()) as url, aiohttp.ClientSession() as session:
        async with session.get(url + "/v1/nothing") as answer:
            check_shape(await answer.json())
            assert answer.status == 404
        async with session.get(url + CHAT) as answer:
            body = await answer.json()
            check_shape(body)
            assert answer.status == 405
            assert answer.headers["Allow"] == "POST"
            assert "POST" in body["error"]["message"]


async def test_large_body_is_refused_by_its_length_before_it_is_sent():
    async with serving(make_context(config=make_config(max_body_bytes=2048))) as url:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        answer = await raw(url, head + b"Content-Length: 104857600\r\n\r\n")
        assert status_of(answer) == 413
        assert b"request_too_large" in answer


async def test_large_chunked_body_is_refused_while_it_is_read():
    async def body():
        for _ in range(64):
            yield b"x" * 1024

    async with serving(make_context(config=make_config(max_body_bytes=2048))) as url:
        status, answer, _ = await post(url, body())
    check_shape(answer)
    assert status == 413


async def test_compressed_body_counts_unpacked():
    packed = gzip.compress(json.dumps({"prompt": "x" * 1_000_000}).encode())
    async with serving(make_context(config=make_config(max_body_bytes=100_000))) as url:
        status, answer, _ = await post(url, packed, {**JSON, "Content-Encoding": "gzip"}, "/v1/completions")
        assert status == 413
        check_shape(answer)
        status, answer, _ = await post(url, b"not gzip at all", {**JSON, "Content-Encoding": "gzip"}, "/v1/completions")
        assert status == 400


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nbad header line\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not http\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_broken_http_is_a_4xx(request_, caplog):
    async with serving(make_context()) as url:
        answer = await raw(url, request_)
        assert "Traceback" not in caplog.text
        if answer:  # some garbage is answered by hanging up
            assert 400 <= status_of(answer) < 500
            assert b"Traceback" not in answer
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"Content-Type: application/json" in head
            check_shape(json.loads(body))
        async with aiohttp.ClientSession() as session, session.get(url + "/health") as healthy:
            assert healthy.status == 200


async def test_overload_is_429_with_retry_after():
    service = FakeService()
    service.engine.refusal = Overloaded("4096 requests are waiting", 2.2)
    async with serving(make_context(service)) as url:
        status, body, headers = await post(url, json.dumps(GOOD))
    check_shape(body)
    assert (status, headers["Retry-After"]) == (429, "3")
    assert body["error"]["code"] == "rate_limit_exceeded"
    assert service.rendered == []  # refused before any work


@pytest.mark.parametrize("state", ["loading", "draining", "failed"])
async def test_not_ready_is_503(state):
    async with serving(make_context(FakeService(state="loading"), state=state)) as url:
        status, body, _ = await post(url, json.dumps(GOOD))
    check_shape(body)
    assert status == 503


async def test_engine_not_ready_is_503_with_retry_after():
    service = FakeService()
    service.engine.refusal = NotReady("draining", retry_after_s=4)
    async with serving(make_context(service)) as url:
        status, _, headers = await post(url, json.dumps(GOOD))
    assert (status, headers["Retry-After"]) == (503, "4")


async def test_our_own_mistake_is_a_500_that_tells_nothing(caplog):
    def build(context):
        async def handle(request):
            raise RuntimeError("secret at /etc/passwd")

        return handle

    routes = [RouteSpec(name="broken", summary="raises", method="GET", path="/broken", build=build)]
    with caplog.at_level(logging.ERROR):
        async with serving(make_context(routes=routes)) as url:
            answer = await call(url, "GET", "/broken")
    assert answer.status == 500
    check_shape(answer.json())
    text = answer.body.decode()
    assert "secret" not in text
    assert "Traceback" not in text
    assert "secret at" in caplog.text  # but the log tells


async def test_request_ids():
    async with serving(make_context()) as url, aiohttp.ClientSession() as session:
        for given, is_kept in [("abc-1.2:3_x", True), ("bad id", False), ("x" * 129, False), ("a\tb", False)]:
            async with session.get(url + "/health", headers={"X-Request-Id": given}) as answer:
                assert (answer.headers["X-Request-Id"] == given) is is_kept
        async with session.get(url + "/nothing") as one, session.get(url + "/nothing") as other:
            assert one.headers["X-Request-Id"] != other.headers["X-Request-Id"]
        async with session.post(url + CHAT, json=GOOD, headers={"X-Request-Id": "mine"}) as answer:
            assert (await answer.json())["id"] == "chatcmpl-mine"


async def test_request_ids_can_be_kept_in():
    async with serving(make_context(config=make_config(return_request_id=False))) as url:
        assert "X-Request-Id" not in (await call(url, "GET", "/health")).headers


async def test_root_path_serves_both_forms():
    async with serving(make_context(config=make_config(root_path="/llm"))) as url, aiohttp.ClientSession() as session:
        for path in ("/health", "/llm/health", "/llm/v1/models"):
            async with session.get(url + path) as answer:
                assert answer.status == 200
