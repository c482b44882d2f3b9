"""Every bound of a request over the demo model: refused at the wire, by name, and nobody else hurt."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
import pytest_asyncio
from plugins.openai.bad_requests import ALL, CHAT, HI
from plugins.openai.openai_server import served_model
from server.serving import call, events_of

pytestmark = pytest.mark.asyncio(loop_scope="module")
JSON = {"Content-Type": "application/json"}
STREAM = {"model": "demo", "messages": HI, "max_tokens": 100, "temperature": 0, "ignore_eos": True, "stream": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url():
    async with served_model("demo", model={"served_model_name": ["demo"]}) as url:
        yield url


def post(url, bad):
    return call(url, "POST", bad.path, data=io.BytesIO(bad.body), headers=JSON)


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
async def test_it_is_refused_by_name(url, bad):
    answer = await post(url, bad)
    error = answer.json()["error"]
    assert (answer.status, error.get("param")) == (bad.status, bad.param), error
    assert error["message"]
    assert len(answer.body) < 3000


async def test_streams_go_on_undisturbed(url):
    def text(events):
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])

    alone = text(await events_of(url, STREAM))
    streams = [asyncio.ensure_future(events_of(url, STREAM)) for _ in range(3)]
    for _ in range(2):  # the second time constraints come from the cache of what failed
        answers = await asyncio.gather(*(post(url, bad) for bad in ALL if len(bad.body) < 100_000))
        assert {answer.status for answer in answers} == {400, 404}
    assert [text(await stream) for stream in streams] == [alone] * 3


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set x = namespace(v='x') %}{% for i in range(99) %}{% set x.v = x.v + x.v %}{% endfor %}{{ x.v }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{% for a in [1] %}" * 50 + "{% endfor %}" * 50,
        "{{" * 5000,
        "x" * (5 << 20),
    ],
    ids=lambda template: template[:40],
)
async def test_templates_of_requests(trusting, template):
    body = {"model": "demo", "messages": HI, "max_tokens": 4, "chat_template": template}
    answer = await call(trusting, "POST", CHAT, data=io.BytesIO(json.dumps(body).encode()), headers=JSON)
    error = answer.json()["error"]
    assert answer.status == 400
    assert error["param"] in ("chat_template", "messages")
    assert len(answer.body) < 3000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trusting():
    plugins = {"openai": {"trust_request_chat_template": True}}
    async with served_model("demo", model={"served_model_name": ["demo"]}, plugins=plugins) as url:
        yield url
