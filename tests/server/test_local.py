"""Routes called from within: whole answers, errors as clients see them, one receipt each, the caller's key, leaving."""

from __future__ import annotations

import asyncio
import json

import pytest
from server.serving import FakeService, make_context, summaries_of, until

from llmd.server.local import LocalClient

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}).encode()


async def test_answers_and_receipts():
    service = FakeService()
    context = make_context(service)
    seen = summaries_of(context)
    async with LocalClient(context, [CHAT]) as client:
        answers = await asyncio.gather(
            *(client.call("POST", CHAT, BODY, key=f"key-{n}", headers={"X-Request-Id": f"r{n}"}) for n in range(5))
        )
        assert [answer.status for answer in answers] == [200] * 5
        assert json.loads(answers[0].body)["choices"][0]["message"]["content"] == "t0 t1 t2"
        assert sorted((summary.key, summary.request_id) for summary in seen) == [(f"key-{n}", f"r{n}") for n in range(5)]
        assert {request.key for request in service.requests} == {f"key-{n}" for n in range(5)}
        wrong = await client.call("POST", CHAT, b"{")
        assert (wrong.status, json.loads(wrong.body)["error"]["code"]) == (400, "invalid_json")
        assert (await client.call("POST", "/v1/completions", BODY)).status == 404
        assert (await client.call("GET", CHAT, b"")).status == 405
        large = await client.call("POST", CHAT, b" " * (context.config.server.max_body_bytes + 1))
        assert large.status == 413
        assert len(seen) == 9


async def test_a_cancelled_call_ends_its_request():
    service = FakeService(step_s=0.05)
    context = make_context(service)
    seen = summaries_of(context)
    async with LocalClient(context, [CHAT]) as client:
        task = asyncio.ensure_future(client.call("POST", CHAT, BODY))
        await until(lambda: bool(service.requests))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: bool(service.closed) and bool(seen))
        assert seen[0].client_gone


async def test_a_closed_client_says_so():
    client = LocalClient(make_context(), [CHAT])
    with pytest.raises(RuntimeError, match="closed"):
        await client.call("POST", CHAT, BODY)
