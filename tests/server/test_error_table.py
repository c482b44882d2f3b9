"""The README's table of errors, row by row: the status, its type and what comes with it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import aiohttp
import pytest
from server.serving import FakeService, call, make_config, make_context, serving, summaries_of, until

from llmd.engine.step import FinishReason
from llmd.errors import Overloaded
from llmd.plugin.specs import RouteSpec

README = Path(__file__).parent.parent.parent / "README.md"
CHAT = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "hi"}]}
KEYS = make_config(api_keys=["secret"], admin_keys=["root"])


def table():
    """Status → type, as the README has them."""
    rows = re.findall(r"^\| (\d{3}) \| .*? \| (?:`(\w+)`)? *\|$", README.read_text(encoding="utf-8"), re.M)
    return {int(status): kind for status, kind in rows}


async def chat(context, **fields):
    async with serving(context) as url:
        return await call(url, "POST", CHAT, {**GOOD, **fields})


async def bad_request():
    return await chat(make_context(), temperature=-1), "temperature"


async def no_key():
    return await chat(make_context(config=KEYS)), None


async def no_admin_key():
    async with serving(make_context(config=KEYS)) as url:
        return await call(url, "GET", "/admin/plugins", headers={"Authorization": "Bearer secret"}), None


async def no_path():
    async with serving(make_context()) as url:
        return await call(url, "POST", "/v1/nothing", GOOD), None


async def no_model():
    return await chat(make_context(), model="nothing"), "model"


async def no_adapter():
    """An adapter is asked for by its name in place of the model's."""
    return await chat(make_context(), model="fake:my-adapter"), "model"


async def wrong_method():
    async with serving(make_context()) as url:
        return await call(url, "DELETE", CHAT), None


async def too_large():
    return await chat(make_context(config=make_config(max_body_bytes=1024)), user="x" * 2000), None


async def no_json():
    async with serving(make_context()) as url:
        return await call(url, "POST", CHAT, data="hi", headers={"Content-Type": "text/plain"}), None


async def too_many():
    service = FakeService()
    service.engine.refusal = Overloaded("4096 requests are waiting", 2.2)
    return await chat(make_context(service)), None


async def a_generation_that_fails():
    return await chat(make_context(FakeService(fail_at=0))), None


async def a_bug():
    async def handle(request):
        raise RuntimeError("a secret")

    routes = [RouteSpec(name="broken", summary="raises", method="POST", path=CHAT, build=lambda context: handle)]
    return await chat(make_context(routes=routes)), None


async def loading():
    return await chat(make_context(FakeService(state="loading"), state="loading")), None


async def shutting_down():
    return await chat(make_context(state="draining")), None


async def too_late():
    return await chat(make_context(FakeService(fail_at=0, fail_as=FinishReason.TIMEOUT, fail_with=None))), None


CASES = [
    (400, bad_request), (401, no_key), (403, no_admin_key), (404, no_path), (404, no_model), (404, no_adapter),
    (405, wrong_method), (413, too_large), (415, no_json), (429, too_many), (500, a_generation_that_fails), (500, a_bug),
    (503, loading), (503, shutting_down), (504, too_late),
]  # fmt: skip
HEADERS = {401: ("WWW-Authenticate", "Bearer"), 405: ("Allow", "POST"), 429: ("Retry-After", "3")}


def test_every_row_has_its_case():
    assert set(table()) == {status for status, _ in CASES} | {499}
    assert 422 not in table()


@pytest.mark.parametrize(("status", "make"), CASES, ids=lambda value: getattr(value, "__name__", value))
async def test_row(status, make):
    answer, param = await make()
    assert answer.status == status
    assert answer.headers.get("Content-Type") == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == table()[status]
    assert error["param"] == param
    assert "secret" not in error["message"]
    if status in HEADERS:
        name, value = HEADERS[status]
        assert answer.headers[name] == value


async def test_499_is_only_in_the_records():
    context = make_context(FakeService(step_s=0.05))
    seen = summaries_of(context)
    async with serving(context) as url, aiohttp.ClientSession() as session:
        task = asyncio.ensure_future(session.post(url + CHAT, json=GOOD))
        await until(lambda: bool(context.service().streams))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: bool(seen))
    assert (seen[0].status, seen[0].client_gone, seen[0].finish_reasons) == (499, True, ("abort",))
