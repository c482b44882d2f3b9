"""Server-sent events on the wire: chunked or not, refused after the client has left."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from server.serving import FakeService, make_context, parse_events, serving

from llmd.plugin.specs import RouteSpec
from llmd.server.sse import EventStream, sse_event

CHAT = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 3}).encode()


async def exchange(url: str, version: bytes) -> tuple[bytes, bytes]:
    """Head and body of a chat stream over a connection that the server closes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        b"POST /v1/chat/completions HTTP/%b\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n" % version
    )
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(CHAT) + CHAT)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return head, body


def unchunked(body: bytes) -> bytes:
    """The payload of a chunked body."""
    payload = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        payload, body = payload + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return payload


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_old_clients_get_the_same_events(version):
    async with serving(make_context(FakeService(step_s=0.01))) as url:
        head, body = await exchange(url, version)
    is_chunked = b"chunked" in head.lower()
    assert is_chunked is (version == b"1.1")
    events = parse_events(unchunked(body) if is_chunked else body)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "t0 t1 t2"


async def test_writing_to_a_client_that_left_raises():
    outcome = asyncio.get_running_loop().create_future()

    def build(context):
        async def handle(request: web.Request) -> web.StreamResponse:
            async with EventStream(request) as events:
                assert not events.can_push
                await events.send(sse_event(b"1"))
                assert events.push(sse_event(b"2"))
                request.transport.abort()
                with pytest.raises(ConnectionError):
                    events.push(sse_event(b"3"))
                with pytest.raises(ConnectionError):
                    await events.send(sse_event(b"4"))
                outcome.set_result(True)
            return events.response

        return handle

    routes = [RouteSpec(name="x", summary="x", method="POST", path="/v1/chat/completions", build=build)]
    async with serving(make_context(routes=routes)) as url:
        await asyncio.gather(exchange(url, b"1.1"), return_exceptions=True)
        assert await asyncio.wait_for(outcome, 2)


def test_event():
    assert sse_event(b'{"a":1}') == b'data: {"a":1}\n\n'
