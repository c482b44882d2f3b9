"""Browsers: preflights without a key, headers on every answer, streams and errors too."""

from __future__ import annotations

import aiohttp
from server.serving import make_config, make_context, serving

from llmd_plugins.server import cors

PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def call(url, method, headers, path="/v1/chat/completions", body=None):
    async with aiohttp.ClientSession() as session, session.request(method, url + path, headers=headers, json=body) as answer:
        await answer.read()
        return answer.status, answer.headers


async def test_preflight_needs_no_key():
    config = make_config(cors_allowed_origins=("https://page.example",), api_keys=("alpha",))
    async with serving(make_context(config=config)) as url:
        status, headers = await call(url, "OPTIONS", PREFLIGHT)
        assert status == 204
        assert headers["Access-Control-Allow-Origin"] == "https://page.example"
        assert "POST" in headers["Access-Control-Allow-Methods"]
        assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        assert headers["Vary"] == "Origin"
        status, headers = await call(url, "OPTIONS", {**PREFLIGHT, "Origin": "https://evil.example"})
        assert status == 403
        assert "Access-Control-Allow-Origin" not in headers


async def test_answers_streams_and_errors_carry_the_header():
    async with serving(make_context(config=make_config(cors_allowed_origins=("*",)))) as url:
        for body, status in ((CHAT, 200), ({**CHAT, "stream": True}, 200), ({}, 400)):
            got, headers = await call(url, "POST", {"Origin": "https://page.example"}, body=body)
            assert got == status
            assert headers["Access-Control-Allow-Origin"] == "*"
            assert "X-Request-Id" in headers["Access-Control-Expose-Headers"]
        _, headers = await call(url, "POST", {}, body=CHAT)
        assert "Access-Control-Allow-Origin" not in headers


def test_without_origins_there_is_no_middleware():
    (spec,) = cors.llmd_register_middlewares()
    assert spec.build(make_config()) is None
