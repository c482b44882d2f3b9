"""Streams as they are on the wire, and what becomes of them when somebody leaves or is slow."""

from __future__ import annotations

import asyncio
import json
import re

import aiohttp
import pytest
from server.serving import FakeService, call, events_of, make_context, parse_events, serving, summaries_of, until

from llmd_plugins.openai import OpenAISettings

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 3}


async def test_chat_events():
    async with serving(make_context()) as url:
        events = await events_of(url, CHAT)
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": "t0"},
        {"content": " t1"},
        {"content": " t2"},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]
    assert events[-1]["choices"][0]["stop_reason"] is None
    assert all("usage" not in event for event in events)


async def test_every_choice_tells_its_role_once():
    async with serving(make_context()) as url:
        events = await events_of(url, {**CHAT, "n": 3})
    for index in range(3):
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"][0]["index"] == index]
        assert ["role" in delta for delta in deltas] == [True, False, False]
        assert "".join(delta.get("content", "") for delta in deltas) == "t0 t1 t2"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_usage(path):
    body = {**CHAT} if "chat" in path else {"prompt": "a b", "stream": True, "max_tokens": 3}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    async with serving(make_context()) as url:
        events = await events_of(url, body, path)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_token_ids():
    async with serving(make_context()) as url:
        events = await events_of(url, {**CHAT, "return_token_ids": True})
        assert events[0]["prompt_token_ids"]
        assert "prompt_token_ids" not in events[1]
        assert [event["choices"][0]["token_ids"] for event in events] == [[10], [11], [12]]
        body = {"prompt": [4, 5], "stream": True, "max_tokens": 2, "return_token_ids": True}
        events = await events_of(url, body, "/v1/completions")
        assert [event["choices"][0].get("prompt_token_ids") for event in events] == [[4, 5], None]


async def test_exactly_one_summary_a_request():
    service = FakeService()
    context = make_context(service)
    seen = summaries_of(context)
    async with serving(context) as url, aiohttp.ClientSession() as session:
        await events_of(url, CHAT)
        await events_of(url, {"prompt": ["a", "b"], "stream": True, "n": 2, "max_tokens": 2}, "/v1/completions")
        async with session.post(url + "/v1/chat/completions", json={**CHAT, "stream": False}) as answer:
            await answer.read()
        async with session.post(url + "/v1/chat/completions", json={}) as answer:
            assert answer.status == 400
        async with session.get(url + "/nope") as answer:
            assert answer.status == 404
    assert [summary.status for summary in seen] == [200, 200, 200, 400, 404]
    assert [summary.finish_reasons for summary in seen] == [("length",), ("length",) * 4, ("length",), (), ()]
    assert [summary.num_output_tokens for summary in seen] == [3, 8, 3, 0, 0]
    chat, completions = "/v1/chat/completions", "/v1/completions"
    assert [summary.route for summary in seen] == [chat, completions, chat, chat, ""]
    assert seen[0].model == "fake"
    assert seen[0].ttft_s is not None
    assert seen[0].e2e_s >= seen[0].ttft_s
    assert len(seen[0].facts["itl_s"]) == 2
    assert "itl_s" not in seen[2].facts
    assert len({summary.request_id for summary in seen}) == 5
    text = context.metrics.render().decode()
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="fake"} 6.0' in text
    assert 'llmd_request_success_total{finished_reason="length",model_name="fake"} 6.0' in text
    assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="fake"} 3.0' in text
    assert 'llmd_http_requests_total{method="POST",route="/v1/chat/completions",status="400"} 1.0' in text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 3])
async def test_a_client_that_leaves_ends_its_request(stream, num_prompts):
    service = FakeService(step_s=0.02, max_words=10_000)
    context = make_context(service)
    seen = summaries_of(context)
    body = {"prompt": ["a"] * num_prompts, "stream": stream}
    async with serving(context) as url:
        async with aiohttp.ClientSession() as session:
            call = asyncio.ensure_future(session.post(url + "/v1/completions", json=body))
            await until(lambda: len(service.streams) == num_prompts)
            if stream:
                answer = await call
                await answer.content.readany()
                answer.close()
            else:
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
        await until(lambda: len(service.closed) == num_prompts)
        await until(lambda: len(seen) == 1)
    (summary,) = seen
    assert summary.client_gone
    assert (summary.status, summary.finish_reasons) == (499, ("abort",))


async def test_a_prompt_that_is_refused_ends_those_before_it():
    service = FakeService()
    async with serving(make_context(service)) as url, aiohttp.ClientSession() as session:
        body = {"prompt": ["a", [5] * 100], "stream": True}
        async with session.post(url + "/v1/completions", json=body) as answer:
            assert answer.status == 400
    assert service.closed == service.streams
    assert len(service.streams) == 1


async def test_quiet_streams_get_comments():
    service = FakeService(step_s=0.2)
    context = make_context(service, sections={"openai": OpenAISettings(keepalive_s=0.05)})
    async with serving(context) as url:
        data = (await call(url, "POST", "/v1/chat/completions", {**CHAT, "max_tokens": 2})).body
    assert data.count(b": keepalive\n\n") >= 4
    assert len(parse_events(data)) == 2


async def test_a_slow_reader_gets_merged_events():
    """Writing stops while the socket is full; what comes meanwhile reaches the client as one piece, and nothing is lost."""
    service = FakeService(max_words=12_000, padding="x" * 1000)
    async with serving(make_context(service)) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = json.dumps({**CHAT, "model": "fake"}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: bool(service.streams) and service.streams[0].num_output_tokens == 12_000, 10)
        data = await reader.read(-1)
        writer.close()
    assert data.count(b"data: [DONE]") == 1
    assert data.count(b"data: {") < 12_000
    assert re.findall(rb" t(\d+)x", data) == [str(step).encode() for step in range(1, 12_000)]
