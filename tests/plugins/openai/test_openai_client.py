"""The official client against a real listener: answers, streams, and errors as the classes that its users catch."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import openai
import pytest
from server.serving import FakeService, make_config, make_context, serving, summaries_of

from llmd.engine.step import FinishReason
from llmd.errors import Overloaded

HELLO = [{"role": "user", "content": "hello there"}]


@asynccontextmanager
async def client(service=None, **changes):
    context = make_context(service, **changes)
    async with serving(context) as url, openai.AsyncOpenAI(base_url=url + "/v1", api_key="alpha", max_retries=0) as api:
        yield api


async def test_models():
    async with client() as api:
        assert [model.id for model in (await api.models.list()).data] == ["fake", "fake-alias"]
        assert (await api.models.retrieve("fake-alias")).root == "fake"
        with pytest.raises(openai.NotFoundError):
            await api.models.retrieve("org/nope")


async def test_chat():
    service = FakeService()
    async with client(service) as api:
        answer = await api.chat.completions.create(
            model="fake-alias",
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
                {"role": "tool", "content": "2", "tool_call_id": "c1"},
            ],
            max_completion_tokens=3, temperature=0.5, seed=7, stop=["END"], n=2, user="u", metadata={"a": "b"}, store=False,
            extra_body={"top_k": 5, "min_p": 0.1, "priority": -1, "repetition_penalty": 1.1, "documents": [{"text": "d"}],
                        "chat_template_kwargs": {"enable_thinking": False}},
        )  # fmt: skip
    assert answer.object == "chat.completion"
    assert answer.model == "fake-alias"
    assert [choice.message.content for choice in answer.choices] == ["t0 t1 t2"] * 2
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.choices[0].stop_reason == "END"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    (request,) = service.requests
    params = request.params
    assert (params.max_tokens, params.temperature, params.seed, params.n) == (3, 0.5, 7, 2)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.1)
    assert (params.stop, request.priority) == (("END",), -1)
    messages, arguments = service.rendered[0]
    assert messages[1]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert messages[3]["tool_call_id"] == "c1"
    assert arguments["enable_thinking"] is False
    assert arguments["documents"] == [{"text": "d"}]
    assert arguments["add_generation_prompt"] is True


async def test_chat_without_max_tokens_may_fill_the_context():
    service = FakeService()
    async with client(service) as api:
        await api.chat.completions.create(model="fake", messages=HELLO)
        await api.completions.create(model="fake", prompt="a")
    assert service.requests[0].params.max_tokens is None
    assert service.requests[1].params.max_tokens == 16


async def test_chat_stream():
    async with client() as api:
        stream = await api.chat.completions.create(
            model="fake", messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "t0 t1 t2 t3"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_chat_stream_helper():
    async with client() as api, api.chat.completions.stream(model="fake", messages=HELLO, stop="E") as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content.startswith("t0 t1 t2")


async def test_completions_of_many_prompts():
    service = FakeService()
    async with client(service) as api:
        answer = await api.completions.create(model="fake", prompt=["a b", "c"], n=2, max_tokens=2, echo=True)
        assert [choice.text for choice in answer.choices] == ["a bt0 t1"] * 2 + ["ct0 t1"] * 2
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.completion_tokens == 8
        await api.completions.create(model="fake", prompt=[5, 6, 7])
        await api.completions.create(model="fake", prompt=[[5, 6], [7]])
        await api.completions.create(model="fake", prompt=["a", [8]])  # what only we take
    prompts = [request.prompt.token_ids for request in service.requests[2:]]
    assert prompts == [(5, 6, 7), (5, 6), (7,), (1, 99), (8,)]


async def test_completion_stream_of_many_prompts():
    async with client() as api:
        stream = await api.completions.create(model="fake", prompt=["a", "b", "c"], max_tokens=3, stream=True, echo=True)
        texts = ["", "", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["at0 t1 t2", "bt0 t1 t2", "ct0 t1 t2"]


async def test_errors_are_the_clients_classes():
    service = FakeService()
    async with client(service, config=make_config(max_body_bytes=20_000)) as api:
        with pytest.raises(openai.BadRequestError) as caught:
            await api.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            await api.chat.completions.create(model="gpt-4", messages=HELLO)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.APIStatusError) as large:
            await api.completions.create(model="fake", prompt="x" * 30_000)
        assert large.value.status_code == 413
        with pytest.raises(openai.BadRequestError) as long:
            await api.completions.create(model="fake", prompt=[3] * 100)
        assert long.value.code == "context_length_exceeded"
        service.engine.refusal = Overloaded("too many", 1)
        with pytest.raises(openai.RateLimitError):
            await api.chat.completions.create(model="fake", messages=HELLO)
        service.engine.refusal = None
        service.state = "loading"
        with pytest.raises(openai.InternalServerError) as loading:
            await api.chat.completions.create(model="fake", messages=HELLO)
        assert loading.value.status_code == 503


async def test_wrong_key():
    async with client(config=make_config(api_keys=("beta",))) as api:
        with pytest.raises(openai.AuthenticationError):
            await api.models.list()


@pytest.mark.parametrize(
    ("reason", "text", "status"),
    [
        (FinishReason.ERROR, "NaN logits", 500),
        (FinishReason.TIMEOUT, None, 504),
        (FinishReason.ABORT, "the output was read too slowly", 503),
    ],
)
async def test_a_generation_that_fails(reason, text, status):
    service = FakeService(fail_at=1, fail_as=reason, fail_with=text)
    context = make_context(service)
    seen = summaries_of(context)
    async with serving(context) as url, openai.AsyncOpenAI(base_url=url + "/v1", api_key="alpha", max_retries=0) as api:
        with pytest.raises(openai.InternalServerError) as caught:
            await api.chat.completions.create(model="fake", messages=HELLO)
        assert caught.value.status_code == status
        stream = await api.chat.completions.create(model="fake", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError) as broken:
            async for _ in stream:
                pass
        assert broken.value.body["message"] == caught.value.body["message"]
    assert [summary.finish_reasons for summary in seen] == [(str(reason),)] * 2
    assert all(summary.facts["error"] for summary in seen)


async def test_an_aborted_sequence_says_so():
    service = FakeService(fail_at=1, fail_as=FinishReason.ABORT, fail_with=None)
    async with client(service) as api:
        answer = await api.chat.completions.create(model="fake", messages=HELLO)
        assert answer.choices[0].finish_reason == "abort"
        assert answer.choices[0].message.content == "t0"


async def test_an_abort_while_draining_is_an_error():
    service = FakeService(step_s=0.05, fail_at=2, fail_as=FinishReason.ABORT, fail_with=None)
    context = make_context(service)
    async with serving(context) as url, openai.AsyncOpenAI(base_url=url + "/v1", api_key="alpha", max_retries=0) as api:
        stream = await api.chat.completions.create(model="fake", messages=HELLO, stream=True)
        whole = asyncio.ensure_future(api.completions.create(model="fake", prompt="a"))
        await asyncio.sleep(0.02)
        context.state = "draining"
        with pytest.raises(openai.APIError, match="draining"):
            async for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError):
            await whole
        with pytest.raises(openai.InternalServerError):
            await api.completions.create(model="fake", prompt="a")
