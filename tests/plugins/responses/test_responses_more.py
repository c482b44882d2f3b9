"""The official client: streams in the background, references to items, log-probabilities, tools that are allowed, counts."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import get_args

import openai
import pytest
from openai.types.responses import (
    input_token_count_params,
    response_create_params,
    response_includable,
    response_input_item_param,
)
from openai.types.responses.easy_input_message_param import EasyInputMessageParam
from openai.types.responses.function_tool_param import FunctionToolParam
from openai.types.responses.response_function_tool_call_param import ResponseFunctionToolCallParam
from openai.types.responses.response_output_message_param import ResponseOutputMessageParam
from openai.types.responses.response_reasoning_item_param import ResponseReasoningItemParam
from scripted import make_folder, scripted
from server.serving import call, serving, summaries_of, until

from llmd.errors import InvalidRequest
from llmd_plugins import responses as plugin
from llmd_plugins.responses import ResponsesSettings, items
from llmd_plugins.responses.feed import Feed
from llmd_plugins.responses.protocol import _INCLUDES, _SERVED_INCLUDES, UNSERVED, CountRequest, ResponseRequest


def tool(name):
    """A function without parameters worth mentioning."""
    return {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, "strict": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("responses") / "model")


@asynccontextmanager
async def client(folder, **options):
    async with (
        scripted(folder, plugin, **options) as model,
        serving(model.context) as url,
        openai.AsyncOpenAI(base_url=url + "/v1", api_key="alpha", max_retries=0) as api,
    ):
        yield api, model, url


# --- every field of the official client has a place


def test_every_field_is_known():
    """Served, accepted or refused by its own name: none is "unknown"."""
    wanted = set(response_create_params.ResponseCreateParamsBase.__annotations__)
    assert wanted - ResponseRequest.model_fields.keys() - UNSERVED.keys() == set()
    wanted = set(input_token_count_params.InputTokenCountParams.__annotations__)
    assert wanted - CountRequest.model_fields.keys() - UNSERVED.keys() == set()
    assert not UNSERVED.keys() & ResponseRequest.model_fields.keys()


@pytest.mark.parametrize(
    ("kind", "types"),
    [
        ("message", (EasyInputMessageParam, ResponseOutputMessageParam, response_input_item_param.Message)),
        ("function_call", (ResponseFunctionToolCallParam,)),
        ("function_call_output", (response_input_item_param.FunctionCallOutput,)),
        ("reasoning", (ResponseReasoningItemParam,)),
        ("item_reference", (response_input_item_param.ItemReference,)),
    ],
)
def test_every_field_of_an_item_is_known(kind, types):
    for one in types:
        assert set(one.__annotations__) <= set(items._ITEMS[kind])


def test_tools_and_includes_are_known():
    assert set(FunctionToolParam.__annotations__) <= set(items._TOOL_FIELDS)
    assert set(get_args(response_includable.ResponseIncludable)) == {*_INCLUDES, *_SERVED_INCLUDES}


# --- streams in the background


async def test_a_stream_in_the_background(folder):
    async with client(folder, step_s=0.01) as (api, model, _):
        seen = summaries_of(model.context)
        model.say("Hello " * 12)
        first = []
        stream = await api.responses.create(model="tiny", input="x", background=True, stream=True)
        async for event in stream:
            first.append(event)
            if event.type == "response.output_text.delta":
                break
        await stream.close()  # the client leaves, the response goes on
        assert [event.type for event in first[:3]] == ["response.created", "response.queued", "response.in_progress"]
        response = first[0].response
        assert (response.status, response.background) == ("queued", True)
        rest = await api.responses.retrieve(response.id, stream=True, starting_after=first[-1].sequence_number)
        events = first + [event async for event in rest]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type == "response.completed"
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == events[-1].response.output_text == ("Hello " * 12)
        again = [event async for event in await api.responses.retrieve(response.id, stream=True)]
        assert [event.model_dump() for event in again] == [event.model_dump() for event in events]
        whole = await api.responses.retrieve(response.id)
        assert whole.model_dump() == events[-1].response.model_dump()
        [summary] = [summary for summary in seen if summary.facts.get("background")]
        assert summary.num_output_tokens == whole.usage.output_tokens


async def test_its_end_by_cancelling_and_by_failing(folder):
    async with client(folder, step_s=0.01, config={"server": {"request_timeout_s": 1.0}}) as (api, model, _):
        model.say("Hello " * 400)
        stream = await api.responses.create(model="tiny", input="x", background=True, stream=True)
        name = (await anext(stream)).response.id
        assert (await api.responses.cancel(name)).status == "cancelled"
        assert [event.type async for event in stream][-1] != "response.completed"
        assert (await api.responses.retrieve(name)).status == "cancelled"
        stream = await api.responses.create(model="tiny", input="x", background=True, stream=True)
        events = [event async for event in stream]
        assert events[-1].type == "response.failed"
        assert "longer than" in events[-1].response.error.message
        assert (await api.responses.retrieve(events[0].response.id)).status == "failed"


async def test_a_feed_is_bounded():
    feed = Feed(10)
    feed.add([b"aaaa", b"bbbb"])
    feed.add([b"cccc"])
    assert feed.num_bytes == 8
    feed.check(0)
    with pytest.raises(InvalidRequest, match="starting_after must be at least 0"):
        feed.check(-1)
    read = []

    async def follow():
        read.extend([data async for data in feed.follow(0)])

    task = asyncio.ensure_future(follow())
    await asyncio.sleep(0)
    feed.add([b"d"])
    feed.close()
    await task
    assert b"".join(read) == b"bbbbccccd"


# --- what goes in


async def test_references_to_items(folder):
    config = {"server": {"api_keys": ["alpha", "beta"]}}
    async with client(folder, config=config, authenticators=True) as (api, model, _):
        model.say("First")
        first = await api.responses.create(model="tiny", input="Hello")
        (asked,) = (await api.responses.input_items.list(first.id)).data
        given = []
        render = model.service.render_chat
        model.service.render_chat = lambda messages, **more: (given.append(messages), render(messages, **more))[1]
        references = [{"type": "item_reference", "id": asked.id}, {"id": first.output[0].id}]
        more = await api.responses.create(model="tiny", input=[*references, {"role": "user", "content": "And?"}])
        assert [message["content"] for message in given[0]] == ["Hello", "First", "And?"]
        kept = (await api.responses.input_items.list(more.id, order="asc")).data
        assert [item.type for item in kept] == ["message"] * 3  # what was referred to, not the reference
        with pytest.raises(openai.NotFoundError) as other:
            await api.with_options(api_key="beta").responses.create(model="tiny", input=references)
        assert (other.value.code, other.value.param) == ("item_not_found", "input[0].id")
        await api.responses.delete(first.id)
        await api.responses.delete(more.id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.create(model="tiny", input=references[:1])


async def test_instructions_are_not_handed_on(folder):
    async with client(folder) as (api, model, _):
        first = await api.responses.create(model="tiny", input="Hello", instructions="Be brief")
        given = []
        render = model.service.render_chat
        model.service.render_chat = lambda messages, **more: (given.append(messages), render(messages, **more))[1]
        fields = {"model": "tiny", "input": "And?", "previous_response_id": first.id}
        await api.responses.create(**fields)
        await api.responses.create(**fields, instructions="Be long")
        assert given[0][0]["role"] == "user"
        assert given[1][0] == {"role": "system", "content": "Be long"}


async def test_allowed_tools(folder):
    async with client(folder) as (api, model, _):
        shown = []
        render = model.service.render_chat
        model.service.render_chat = lambda messages, **more: (shown.append(more["tools"]), render(messages, **more))[1]
        model.say("no")
        names = ["one", "two", "three"]
        some = [{"type": "function", "name": name} for name in names[:2]]
        for mode in ("auto", "required"):
            answer = await api.responses.create(
                model="tiny", input="x", tools=[tool(name) for name in names], max_output_tokens=300,
                tool_choice={"type": "allowed_tools", "mode": mode, "tools": some},
            )  # fmt: skip
            assert [one["function"]["name"] for one in shown.pop()] == names[:2]
            assert answer.tool_choice.type == "allowed_tools"
            assert len(answer.tools) == 3
        assert {item.name for item in answer.output if item.type == "function_call"} <= {"one", "two"}
        assert answer.output[0].type == "function_call"


async def test_counting_tokens(folder):
    async with client(folder) as (api, model, _):
        fields = {"model": "tiny", "input": "Hello world", "instructions": "Be brief", "tools": [tool("one")]}
        counted = await api.responses.input_tokens.count(**fields)
        answer = await api.responses.create(**fields)
        assert (counted.object, counted.input_tokens) == ("response.input_tokens", answer.usage.input_tokens)
        after = await api.responses.input_tokens.count(model="tiny", previous_response_id=answer.id)
        assert after.input_tokens > 0
        with pytest.raises(openai.BadRequestError, match="input is required"):
            await api.responses.input_tokens.count(model="tiny")
        assert model.service.engine.stats().admitted == 1


async def test_what_has_no_effect(folder):
    async with client(folder) as (api, model, _):
        model.say("Hello")
        answer = await api.responses.create(
            model="tiny", input="x", max_tool_calls=3, text={"verbosity": "low"}, reasoning={"summary": "detailed"},
            service_tier="flex", safety_identifier="s", prompt_cache_key="k", truncation="disabled",
        )  # fmt: skip
        assert (answer.max_tool_calls, answer.text.verbosity, answer.output_text) == (3, "low", "Hello")


async def test_fields_of_vllm(folder):
    async with client(folder) as (api, model, _):
        seen = summaries_of(model.context)
        requests = []
        add = model.service.engine.add
        model.service.engine.add = lambda request: (requests.append(request), add(request))[1]
        model.say("Hello world; more")
        extra = {"top_k": 3, "seed": 7, "stop": ";", "priority": -2, "cache_salt": "s", "request_id": "mine"}
        answer = await api.responses.create(model="tiny", input="x", extra_body=extra)
        assert answer.output_text == "Hello world"
        params = requests[0].params
        assert (params.top_k, params.seed, tuple(params.stop), requests[0].priority) == (3, 7, (";",), -2)
        assert requests[0].namespace != b""
        assert seen[0].request_id == "mine"


# --- what comes out


async def test_logprobs(folder):
    async with client(folder) as (api, model, _):
        model.say("<think>\nhm\n</think>\n\nHello world")
        fields = {"model": "tiny", "input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
        whole = await api.responses.create(**fields)
        reasoning, message = whole.output
        assert reasoning.content[0].text == "hm"
        entries = message.content[0].logprobs
        assert len(entries) in (num := len(model.ids("Hello world")), num + 1)  # the end token may be one of them
        assert all(len(entry.top_logprobs) <= 2 for entry in entries)
        assert all(bytes(entry.bytes).decode(errors="replace") == entry.token for entry in entries)
        events = [event async for event in await api.responses.create(**fields, stream=True)]
        said = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
        assert len(said) == len(entries)
        final = events[-1].response.output[1].content[0].logprobs
        assert [(entry.token, entry.logprob) for entry in final] == [(entry.token, entry.logprob) for entry in said]
        without = await api.responses.create(model="tiny", input="x")
        assert without.output[1].content[0].logprobs == []


async def test_the_store_forgets_feeds_too(folder):
    sections = {"responses": ResponsesSettings(max_stored=1)}
    async with client(folder, sections=sections) as (api, model, url):
        model.say("Hello")
        stream = await api.responses.create(model="tiny", input="x", background=True, stream=True)
        events = [event async for event in stream]
        name = events[0].response.id
        store = model.context.shared["responses"]
        await until(lambda: not store.running)
        assert store.num_bytes > sum(len(event.to_json(indent=None)) for event in events[:-1])
        await api.responses.create(model="tiny", input="x")
        assert len(store) == 1
        answer = await call(url, "GET", f"/v1/responses/{name}?stream=true")
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (404, "response_not_found")
