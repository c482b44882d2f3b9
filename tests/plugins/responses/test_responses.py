"""The official client against a real listener: items, events, the store, background, truncation, refusals."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import make_folder, scripted
from server.serving import call, serving, summaries_of, until

from llmd_plugins import responses as plugin
from llmd_plugins.responses import ResponsesSettings
from llmd_plugins.responses.items import messages_of, parse_input
from llmd_plugins.responses.store import Store

TOOL = {
    "type": "function",
    "name": "add",
    "description": "adds",
    "parameters": {
        "type": "object", "properties": {"a": {"enum": [7, 8]}}, "required": ["a"], "additionalProperties": False,
    },
    "strict": True,
}  # fmt: skip
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call>'
THOUGHT = "<think>\nhm, 1 2 3\n</think>\n\nHello"


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


def bare(item):
    return {name: value for name, value in item.model_dump().items() if name not in ("id", "call_id")}


async def streamed(api, **fields):
    stream = await api.responses.create(model="tiny", stream=True, **fields)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    return events


async def test_text(folder):
    async with client(folder) as (api, model, _):
        seen = summaries_of(model.context)
        model.say("Hello, how are you?")
        whole = await api.responses.create(
            model="tiny",
            input="Hello world",
            instructions="Be brief",
            temperature=0,
            top_p=0.9,
            metadata={"a": "b"},
            user="u",
        )
        assert whole.output_text == "Hello, how are you?"
        assert (whole.status, whole.object, whole.model, whole.metadata) == ("completed", "response", "tiny", {"a": "b"})
        assert (whole.temperature, whole.top_p, whole.instructions) == (0, 0.9, "Be brief")
        assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
        events = await streamed(api, input=[{"role": "user", "content": "Hello world"}], instructions="Be brief")
        final = events[-1].response
        assert events[-1].type == "response.completed"
        assert [bare(item) for item in final.output] == [bare(item) for item in whole.output]
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
        assert final.usage.input_tokens_details.cached_tokens > 0
        assert len(seen) == 2
        assert [summary.finish_reasons for summary in seen] == [("stop",)] * 2
        assert seen[0].num_output_tokens == whole.usage.output_tokens


async def test_events_in_order(folder):
    async with client(folder) as (api, model, _):
        model.say(THOUGHT + CALL)
        fields = {"input": "Hello", "tools": [TOOL], "reasoning": {"effort": "low", "summary": "auto"}}
        fields["include"] = ["reasoning.encrypted_content"]
        events = await streamed(api, **fields)
        kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
        assert kinds == [
            "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta",
            "reasoning_text.done", "content_part.done", "output_item.done", "output_text.delta", "output_text.done",
            "function_call_arguments.delta", "function_call_arguments.done", "completed",
        ]  # fmt: skip
        final = events[-1].response
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        assert final.output[0].content[0].text == "hm, 1 2 3"
        assert final.output_text == "Hello"
        assert json.loads(final.output[2].arguments) == {"a": 7}
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert [item.model_dump() for item in done] == [item.model_dump() for item in final.output]
        added = [event.item for event in events if event.type == "response.output_item.added"]
        assert {item.status for item in added} == {"in_progress"}
        assert final.usage.output_tokens_details.reasoning_tokens > 0
        whole = await api.responses.create(model="tiny", **fields)
        assert [bare(item) for item in whole.output] == [bare(item) for item in final.output]


async def test_tool_round_with_previous_response(folder):
    async with client(folder) as (api, model, _):
        model.say(CALL)
        first = await api.responses.create(model="tiny", input="Add seven", tools=[TOOL])
        (use,) = first.output
        assert (use.type, use.name) == ("function_call", "add")
        given = []
        render = model.service.render_chat
        model.service.render_chat = lambda messages, **more: (given.append(messages), render(messages, **more))[1]
        model.say("It is 7!")
        result = {"type": "function_call_output", "call_id": use.call_id, "output": "seven"}
        second = await api.responses.create(model="tiny", input=[result], previous_response_id=first.id, tools=[TOOL])
        assert second.output_text == "It is 7!"
        assert second.previous_response_id == first.id
        assert [message["role"] for message in given[0]] == ["user", "assistant", "tool"]
        assert given[0][1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 7}}
        assert given[0][1]["tool_calls"][0]["id"] == given[0][2]["tool_call_id"] == use.call_id
        third = await api.responses.create(model="tiny", input="and?", previous_response_id=second.id)
        assert [message["role"] for message in given[1]] == ["user", "assistant", "tool", "assistant", "user"]
        await api.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError) as gone:
            await api.responses.create(model="tiny", input="and?", previous_response_id=third.id)
        assert gone.value.code == "previous_response_not_found"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "add"}])
async def test_forced_tools(folder, choice):
    async with client(folder) as (api, model, _):
        model.say("I would rather talk")
        answer = await api.responses.create(
            model="tiny", input="Hello", tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=900
        )
        assert [item.type for item in answer.output] == ["function_call"]
        assert json.loads(answer.output[0].arguments)["a"] in (7, 8)


async def test_formats(folder):
    schema = TOOL["parameters"]
    async with client(folder) as (api, model, _):
        model.say("no")
        text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
        answer = await api.responses.create(model="tiny", input="Hello", text=text, max_output_tokens=80)
        assert json.loads(answer.output_text)["a"] in (7, 8)
        assert answer.text.format.type == "json_schema"
        model.say('{"x": 1}')
        answer = await api.responses.create(model="tiny", input="Hello", text={"format": {"type": "json_object"}})
        assert json.loads(answer.output_text) == {"x": 1}


async def test_incomplete_and_long(folder):
    async with client(folder, max_model_len=96, num_blocks=64) as (api, model, _):
        model.say("Counting: 1 2 3 44 555;")
        answer = await api.responses.create(model="tiny", input="Hello", max_output_tokens=3)
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert answer.output[0].status == "incomplete"
        events = await streamed(api, input="Hello", max_output_tokens=3)
        assert events[-1].type == "response.incomplete"
        assert (await api.responses.create(model="tiny", input="Hello", max_output_tokens=5000)).status == "completed"
        turns = [{"role": "system", "content": "S"}]
        turns += [{"role": role, "content": f"Hello {n}"} for n in range(20) for role in ("user", "assistant")]
        turns.append({"role": "user", "content": "last"})
        with pytest.raises(openai.BadRequestError) as long:
            await api.responses.create(model="tiny", input=turns)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
        given = []
        generate = model.service.generate
        model.service.generate = lambda prompt, *rest, **more: (given.append(prompt), generate(prompt, *rest, **more))[1]
        answer = await api.responses.create(model="tiny", input=turns, truncation="auto", max_output_tokens=20)
        assert answer.truncation == "auto"
        assert "system\nS" in given[0]
        assert "last" in given[0]
        assert "Hello 19" in given[0]
        assert "Hello 0" not in given[0]


async def test_stored(folder):
    config = {"server": {"api_keys": ["alpha", "beta"]}}
    async with client(folder, config=config, authenticators=True) as (api, model, _):
        model.say("Hello")
        items = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
        answer = await api.responses.create(model="tiny", input=items)
        assert (await api.responses.retrieve(answer.id)).model_dump() == answer.model_dump()
        listed = await api.responses.input_items.list(answer.id, order="asc", limit=2)
        assert [item.content[0].text for item in listed.data] == ["a", "b"]
        assert listed.has_more
        rest = await api.responses.input_items.list(answer.id, order="asc", after=listed.data[-1].id)
        assert [item.content[0].text for item in rest.data] == ["c"]
        other = api.with_options(api_key="beta")
        with pytest.raises(openai.NotFoundError):
            await other.responses.retrieve(answer.id)
        with pytest.raises(openai.NotFoundError):
            await other.responses.create(model="tiny", input="x", previous_response_id=answer.id)
        with pytest.raises(openai.BadRequestError, match="background"):
            await api.responses.cancel(answer.id)
        await api.responses.delete(answer.id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.delete(answer.id)
        unkept = await api.responses.create(model="tiny", input="x", store=False)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(unkept.id)


async def test_background(folder):
    settings = {"responses": ResponsesSettings(max_background=2)}
    async with client(folder, step_s=0.01, sections=settings) as (api, model, _):
        seen = summaries_of(model.context)
        model.say("Hello")
        queued = await api.responses.create(model="tiny", input="x", background=True)
        assert (queued.status, queued.output) == ("queued", [])
        store = model.context.shared["responses"]
        await until(lambda: not store.running, 20)
        done = await api.responses.retrieve(queued.id)
        assert (done.status, done.output_text, done.background) == ("completed", "Hello", True)
        assert (await api.responses.cancel(queued.id)).status == "completed"
        assert [summary.num_output_tokens for summary in seen if summary.facts.get("background")] == [
            done.usage.output_tokens
        ]
        model.say("Hello " * 200)
        long = [await api.responses.create(model="tiny", input="x", background=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError):
            await api.responses.create(model="tiny", input="x", background=True)
        with pytest.raises(openai.BadRequestError, match="not finished"):
            await api.responses.create(model="tiny", input="x", previous_response_id=long[0].id)
        assert (await api.responses.retrieve(long[0].id)).status == "in_progress"
        assert (await api.responses.cancel(long[0].id)).status == "cancelled"
        await api.responses.delete(long[1].id)
        await until(lambda: not store.running and model.service.engine.stats().num_running == 0, 20)
        assert (await api.responses.retrieve(long[0].id)).status == "cancelled"


async def test_failures(folder):
    async with client(folder, config={"server": {"request_timeout_s": 0.15}}, step_s=0.02) as (api, model, _):
        model.say("Hello " * 200)
        with pytest.raises(openai.InternalServerError):
            await api.responses.create(model="tiny", input="x")
        events = await streamed(api, input="x")
        assert events[-1].type == "response.failed"
        assert events[-1].response.status == "failed"
        assert "longer than" in events[-1].response.error.message
        queued = await api.responses.create(model="tiny", input="x", background=True)
        await until(lambda: not model.context.shared["responses"].running, 20)
        assert (await api.responses.retrieve(queued.id)).status == "failed"


async def test_leaving_frees_the_engine(folder):
    async with client(folder, step_s=0.01) as (_, model, url):
        seen = summaries_of(model.context)
        model.say("Hello " * 200)
        task = asyncio.ensure_future(call(url, "POST", "/v1/responses", {"input": "x", "stream": True}))
        await until(lambda: model.service.engine.stats().num_running == 1, 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: model.service.engine.stats().num_running == 0 and bool(seen), 20)
        assert seen[0].client_gone


BAD = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [3]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": ""}]}, "input[0].id"),
    ({"input": [{"type": "custom_tool_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
    ({"input": [{"role": "user", "content": "x", "nmae": 1}]}, "input[0].nmae"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"top_logprobs": 5000}, "top_logprobs"),
    ({"top_logprobs": -1}, "top_logprobs"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{**TOOL, "allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "x", "tools": []}}, "tool_choice.mode"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
        "tool_choice.tools[0].type",
    ),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{**TOOL, "name": "sub"}]}},
        "tool_choice",
    ),
    ({"moderation": {}}, "moderation"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"previous_input_messages": []}, "previous_input_messages"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"text": {"verbosity": "loud"}}, "text.verbosity"),
    ({"stop": [""]}, "stop"),
    ({"include": ["nothing"]}, "include[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"max_tool_calls": -3}, "max_tool_calls"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    (
        {"text": {"format": {"type": "json_schema", "schema": {"type": "none"}}}, "reasoning": {"effort": "none"}},
        "text.format.schema",
    ),
    ({"reasoning": {"effort": "lots"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
    ({"background": True, "store": False}, "background"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"max_output_tokns": 3}, "max_output_tokns"),
    ({"stream_options": {}}, "stream_options"),
]  # fmt: skip


async def test_refusals_name_the_field(folder):
    async with client(folder) as (_, model, url):
        seen = summaries_of(model.context)
        for changes, param in BAD:
            answer = await call(url, "POST", "/v1/responses", {"model": "tiny", "input": "x", **changes})
            error = answer.json()["error"] or {"param": None}
            assert (answer.status, error["param"]) == (400, param), (changes, error)
        assert len(seen) == len(BAD)
        assert (await call(url, "POST", "/v1/responses", {"model": "nope", "input": "x"})).status == 404
        queries = ("limit=0", "limit=x", "order=up", "after=zzz")
        stored = (await call(url, "POST", "/v1/responses", {"input": "x", "max_output_tokens": 1})).json()["id"]
        for query in queries:
            assert (await call(url, "GET", f"/v1/responses/{stored}/input_items?{query}")).status == 400
        for query in ("stream=true", "starting_after=3", "stream=true&starting_after=x", "include=nothing"):
            assert (await call(url, "GET", f"/v1/responses/{stored}?{query}")).status == 400
        lost = await call(url, "POST", "/v1/responses", {"input": [{"id": "msg_0"}]})
        assert (lost.status, lost.json()["error"]["param"]) == (404, "input[0].id")
        assert (await call(url, "GET", "/v1/responses/..%2f..%2fetc")).status == 404


async def test_too_many_items(folder):
    async with client(folder, config={"limits": {"max_messages": 3}}) as (api, model, _):
        model.say("Hello")
        first = await api.responses.create(model="tiny", input=[{"role": "user", "content": "x"}] * 2)
        with pytest.raises(openai.BadRequestError, match="at most 3"):
            await api.responses.create(model="tiny", input="x", previous_response_id=first.id)


def made(response_id, previous=None, size=1):
    return {"id": response_id, "status": "completed", "previous_response_id": previous, "output": [{"text": "x" * size}]}


def test_the_store_is_bounded():
    store = Store(ResponsesSettings(max_stored=3, max_stored_bytes=4000))
    for number in range(5):
        store.put("k", made(f"r{number}", f"r{number - 1}" if number else None), [{"n": number}])
    assert len(store) == 3
    assert b'"r4"' in store.get("k", "r4").response
    store.put("k", made("big", size=5000), [])
    assert len(store) == 3
    for number in range(3):
        store.put("k", made(f"m{number}", size=1200), [])
    assert store.num_bytes <= 4000
    assert len(store) == 2
    store.put("k", made("m2", size=10), [])
    assert store.num_bytes == sum(store.get("k", name).num_bytes for name in ("m1", "m2"))
    off = Store(ResponsesSettings(max_stored=0))
    off.put("k", made("r"), [])
    assert len(off) == 0


def test_one_turn_is_one_message():
    items = parse_input([
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"},
        {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "o"}]},
        {"role": "assistant", "content": "d"},
        {"role": "assistant", "content": "e"},
    ])  # fmt: skip
    messages = messages_of(items, "I")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant", "assistant"]
    assert messages[0]["content"] == "I\n\nD"
    assert (messages[2]["reasoning_content"], messages[2]["content"]) == ("hm", "c")
    assert [one["function"]["arguments"] for one in messages[2]["tool_calls"]] == ["{", {}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 500) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "input", "instructions", "tools", "tool_choice", "text", "reasoning", "include", "metadata", "max_output_tokens",
    "temperature", "top_p", "stream", "model", "store", "background", "previous_response_id", "truncation",
]  # fmt: skip


async def test_no_value_of_a_field_breaks_it(folder):
    cases = []

    @given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
    @settings(max_examples=120, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    def collect(changes):
        cases.append(changes)

    collect()
    async with client(folder) as (_, _, url):
        for changes in cases:
            body = {"input": "x", "max_output_tokens": 2, **changes}
            assert (await call(url, "POST", "/v1/responses", body)).status in (200, 400, 404), changes
