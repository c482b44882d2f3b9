"""POST /tokenize and /detokenize."""

from __future__ import annotations

from plugins.openai.demo_served import demo_served
from server.serving import FakeService, call, make_context, serving


async def post(path, body, service=None):
    async with serving(make_context(service)) as url:
        answer = await call(url, "POST", path, body)
    return answer.status, answer.json()


async def test_text():
    status, answer = await post("/tokenize", {"model": "fake", "prompt": "a b", "return_token_strs": True})
    assert status == 200
    assert answer == {"count": 3, "max_model_len": 64, "tokens": [1, 99, 100], "token_strs": ["w1", "a", "b"]}
    _, answer = await post("/tokenize", {"prompt": "a b", "add_special_tokens": False})
    assert answer["tokens"] == [99, 100]
    assert answer["token_strs"] is None


async def test_conversation():
    service = FakeService()
    body = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    status, answer = await post("/tokenize", body, service)
    assert status == 200
    assert answer["count"] == 2
    assert service.rendered[0][1]["add_generation_prompt"] is False


async def test_back_to_text():
    service = FakeService()
    _, there = await post("/tokenize", {"prompt": "a b"}, service)
    assert await post("/detokenize", {"tokens": there["tokens"]}, service) == (200, {"prompt": "a b"})
    assert await post("/detokenize", {"tokens": []}, service) == (200, {"prompt": ""})


async def test_tokenizer_info():
    async with demo_served() as (_, url):
        answer = await call(url, "GET", "/tokenizer_info?model=demo")
        missing = await call(url, "GET", "/tokenizer_info?model=nobody")
        ids = (await call(url, "POST", "/tokenize", {"prompt": answer.json()["eos_token"]})).json()["tokens"]
    assert (answer.status, missing.status) == (200, 404)
    assert len(ids) == 1, "the end token is one token"
    assert "{%" in answer.json()["chat_template"]


async def test_refusals():
    for body, param in [({"tokens": [5, 1000]}, "tokens[1]"), ({"tokens": [-1]}, "tokens[0]"), ({}, "tokens"),
                        ({"tokens": "x"}, "tokens"), ({"tokens": [1.5]}, "tokens[0]")]:  # fmt: skip
        status, answer = await post("/detokenize", body)
        assert (status, answer["error"]["param"]) == (400, param)
    status, answer = await post("/tokenize", {})
    assert (status, answer["error"]["param"]) == (400, "prompt")
