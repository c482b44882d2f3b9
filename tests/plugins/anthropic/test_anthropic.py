"""The official client against a real listener: messages, streams, tools, thinking, and errors as its users catch them."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import anthropic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import make_folder, scripted
from server.serving import call, serving, summaries_of, until

from llmd_plugins import anthropic as plugin
from llmd_plugins.anthropic.blocks import Blocks, content_of

HELLO = [{"role": "user", "content": "Hello world"}]
TOOL = {
    "name": "add",
    "description": "adds",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call>'
THOUGHT = "<think>\nhm, 1 2 3\n</think>\n\nHello"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("anthropic") / "model")


@asynccontextmanager
async def client(folder, **options):
    async with (
        scripted(folder, plugin, **options) as model,
        serving(model.context) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="alpha", max_retries=0) as api,
    ):
        yield api, model, url


async def both(api, **fields):
    """The whole answer and the streamed one, which must be equal."""
    whole = await api.messages.create(model="tiny", **{"messages": HELLO, "max_tokens": 240, **fields})
    async with api.messages.stream(model="tiny", **{"messages": HELLO, "max_tokens": 240, **fields}) as stream:
        final = await stream.get_final_message()
    for message in (whole, final):
        for block in message.content:
            block.__dict__.pop("parsed_output", None)
            if block.type == "tool_use":
                assert block.id.startswith("toolu_")
                block.id = ""
            if block.type == "thinking":
                assert block.signature
                block.signature = ""
    plain = [[b.model_dump(exclude={"parsed_output"}) for b in m.content] for m in (whole, final)]
    assert plain[0] == plain[1]
    assert (whole.stop_reason, whole.stop_sequence) == (final.stop_reason, final.stop_sequence)
    assert whole.usage.output_tokens == final.usage.output_tokens
    return whole


async def test_text(folder):
    async with client(folder) as (api, model, _):
        model.say("Hello, how are you?")
        message = await both(api, system="Be brief", metadata={"user_id": "u"}, extra_body={"temperature": 0, "top_k": 3})
        assert [block.text for block in message.content] == ["Hello, how are you?"]
        assert (message.stop_reason, message.role, message.type, message.model) == (
            "end_turn",
            "assistant",
            "message",
            "tiny",
        )
        again = await api.messages.create(model="tiny", messages=HELLO, max_tokens=64, system="Be brief")
        first = message.usage
        assert again.usage.cache_read_input_tokens > 0
        total = first.input_tokens + first.cache_read_input_tokens
        assert again.usage.input_tokens + again.usage.cache_read_input_tokens == total
        counted = await api.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief")
        assert counted.input_tokens == total


async def test_stops(folder):
    async with client(folder, max_model_len=128, num_blocks=64) as (api, model, _):
        model.say("Counting: 1 2 3 44 555;")
        stopped = await both(api, stop_sequences=["44", "zzz"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "44")
        assert stopped.content[0].text == "Counting: 1 2 3 "
        assert (await both(api, max_tokens=2)).stop_reason == "max_tokens"
        model.say("Hello " * 200)
        full = await both(api, max_tokens=8000)
        assert full.stop_reason == "model_context_window_exceeded"


async def test_events_in_order(folder):
    async with client(folder) as (api, model, _):
        model.say(THOUGHT + CALL)
        thinking = {"type": "enabled", "budget_tokens": 40}
        events = []
        async for event in await api.messages.create(
            model="tiny", messages=HELLO, max_tokens=240, tools=[TOOL], thinking=thinking, stream=True
        ):
            events.append(event)
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert events[0].message.usage.input_tokens > 0
    assert kinds[-2:] == ["message_delta", "message_stop"]
    starts = [event.content_block.type for event in events if event.type == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use"]
    assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1, 2]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(delta.thinking for delta in deltas if delta.type == "thinking_delta") == "hm, 1 2 3"
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta").strip() == "Hello"
    parts = [delta.partial_json for delta in deltas if delta.type == "input_json_delta"]
    assert json.loads("".join(parts)) == {"a": 7}
    assert len(parts) > 1
    assert [delta.type for delta in deltas].count("signature_delta") == 1
    assert events[-2].delta.stop_reason == "tool_use"
    assert events[-2].usage.output_tokens > 0


async def test_tool_use_and_result(folder):
    async with client(folder) as (api, model, _):
        model.say(CALL)
        message = await both(api, tools=[TOOL])
        (use,) = message.content
        assert (use.type, use.name, use.input, message.stop_reason) == ("tool_use", "add", {"a": 7}, "tool_use")
        seen = summaries_of(model.context)
        model.say("It is 7!")
        conversation = [
            *HELLO,
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "mmm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I add"}, {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 7}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "seven"}]},
                {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral"}}]},
        ]  # fmt: skip
        messages = []
        render = model.service.render_chat
        model.service.render_chat = lambda given, **more: (messages.append(given), render(given, **more))[1]
        answer = await api.messages.create(model="tiny", messages=conversation, max_tokens=20, tools=[TOOL])
        assert answer.content[0].text == "It is 7!"
        assert [message["role"] for message in messages[0]] == ["user", "assistant", "tool", "user"]
        assert messages[0][1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 7}}
        assert messages[0][1]["reasoning_content"] == "mmm"
        assert messages[0][2] == {"role": "tool", "tool_call_id": "toolu_1", "content": "seven"}
        assert len(seen) == 1
        assert (seen[0].route, seen[0].finish_reasons) == ("/v1/messages", ("stop",))
        assert seen[0].num_output_tokens == answer.usage.output_tokens


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add", "disable_parallel_tool_use": True}])
async def test_forced_tools(folder, choice):
    async with client(folder) as (api, model, _):
        model.say("I would rather talk")
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
        tools = [{**TOOL, "input_schema": schema}]
        message = await api.messages.create(model="tiny", messages=HELLO, max_tokens=900, tools=tools, tool_choice=choice)
        assert message.stop_reason == "tool_use"
        assert {block.name for block in message.content} == {"add"}
        assert message.content[0].input["a"] in (1, 2)


async def test_tool_choice_none_and_single(folder):
    async with client(folder) as (api, model, _):
        model.say(CALL)
        none = await both(api, tools=[TOOL], tool_choice={"type": "none"})
        assert none.content[0].text == CALL
        model.say(CALL + CALL)
        two = await both(api, tools=[TOOL])
        assert [block.type for block in two.content] == ["tool_use", "tool_use"]
        one = await both(api, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        assert len(one.content) == 1


async def test_thinking(folder):
    async with client(folder) as (api, model, _):
        model.say(THOUGHT)
        for thinking in ({"type": "adaptive"}, {"type": "enabled", "budget_tokens": 30}):
            message = await both(api, thinking=thinking)
            assert [block.type for block in message.content] == ["thinking", "text"]
            assert message.content[0].thinking == "hm, 1 2 3"
        for fields in ({}, {"thinking": {"type": "disabled"}}, {"thinking": {"type": "adaptive", "display": "omitted"}}):
            message = await both(api, **fields)
            assert message.content[-1].text.endswith("Hello")
            assert "thinking" not in {block.type for block in message.content}
        short = await both(api, thinking={"type": "enabled", "budget_tokens": 14})
        assert short.content[0].type == "thinking"


async def test_prefill_and_schema(folder):
    async with client(folder) as (api, model, _):
        model.say(" world")
        message = await both(api, messages=[*HELLO, {"role": "assistant", "content": "Hello"}])
        assert message.content[0].text == " world"
        schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
        config = {"format": {"type": "json_schema", "schema": schema}}
        message = await api.messages.create(model="tiny", messages=HELLO, max_tokens=64, output_config=config)
        assert json.loads(message.content[0].text)["x"] in (1, 2)


BAD = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "no images"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "no documents"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]}, "[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "txt": "x", "text": "y"}]}]}, "did you mean 'text'"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "name"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]}, "next"),
    ({"system": 3}, "system"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 64}}, "less than max_tokens"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"stop_sequences": [""]}, "stop_sequences must"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not served"),
    ({"container": "c"}, "container is not served"),
    ({"max_tokns": 3}, "did you mean 'max_tokens'"),
    ({"top_k": 1.5}, "top_k"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}}, "output_config.format"),
]  # fmt: skip


async def test_refusals_name_the_field(folder):
    async with client(folder) as (_, model, url):
        seen = summaries_of(model.context)
        for changes, words in BAD:
            answer = await call(
                url, "POST", "/v1/messages", {"model": "tiny", "messages": HELLO, "max_tokens": 64, **changes}
            )
            body = answer.json()
            assert answer.status == 400, (changes, body)
            assert set(body) == {"type", "error", "request_id"}
            assert body["type"] == "error"
            assert body["error"]["type"] == "invalid_request_error"
            assert words in body["error"]["message"], (changes, body)
        assert len(seen) == len(BAD)


async def test_errors_as_the_client_catches_them(folder):
    async with client(folder, config={"server": {"api_keys": ["alpha"]}}, authenticators=True) as (api, _, url):
        with pytest.raises(anthropic.NotFoundError) as missing:
            await api.messages.create(model="claude", messages=HELLO, max_tokens=3)
        assert missing.value.body["error"]["type"] == "not_found_error"
        assert missing.value.request_id
        with pytest.raises(anthropic.AuthenticationError) as stranger:
            await api.with_options(api_key="wrong").messages.create(model="tiny", messages=HELLO, max_tokens=3)
        assert stranger.value.body["error"]["type"] == "authentication_error"
        with pytest.raises(anthropic.BadRequestError):
            await api.messages.create(model="tiny", messages=[{"role": "user", "content": "Hello " * 3000}], max_tokens=3)
        assert (await call(url, "GET", "/v1/messages", headers={"x-api-key": "alpha"})).status == 405
        assert (await call(url, "POST", "/v1/messages", {"a": 1}, headers={"x-api-key": "alpha"})).status == 400
        other = (await call(url, "GET", "/v1/messagesx")).json()
        assert set(other) == {"error"}


async def test_overload_and_deadline_and_failure(folder):
    config = {"server": {"request_timeout_s": 0.5}, "scheduler": {"max_waiting_requests": 1}}
    async with client(folder, config=config, step_s=0.02, max_num_seqs=1) as (api, model, _):
        model.say("Hello " * 100)
        results = await asyncio.gather(
            *(api.messages.create(model="tiny", messages=HELLO, max_tokens=90) for _ in range(6)), return_exceptions=True
        )
        kinds = {type(result) for result in results}
        assert anthropic.RateLimitError in kinds
        assert {result.body["error"]["type"] for result in results} == {"rate_limit_error", "timeout_error"}
        with pytest.raises(anthropic.APIStatusError) as late:
            async with api.messages.stream(model="tiny", messages=HELLO, max_tokens=90) as stream:
                await stream.get_final_message()
        assert late.value.body["error"]["type"] == "timeout_error"


async def test_leaving_frees_the_engine(folder):
    async with client(folder, step_s=0.01) as (_, model, url):
        seen = summaries_of(model.context)
        model.say("Hello " * 150)
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "stream": True}
        task = asyncio.ensure_future(call(url, "POST", "/v1/messages", body))
        await until(lambda: model.service.engine.stats().num_running == 1, 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: model.service.engine.stats().num_running == 0 and bool(seen), 20)
        assert (seen[0].status, seen[0].client_gone) == (499, True)


async def test_too_many_messages(folder):
    async with client(folder, config={"limits": {"max_messages": 2}}) as (api, _, _):
        with pytest.raises(anthropic.BadRequestError, match="at most 2"):
            await api.messages.create(model="tiny", messages=HELLO * 3, max_tokens=3)


def test_arguments_that_are_no_object():
    from llmd.api.v1 import ToolCallDelta

    blocks = Blocks(None)
    events = blocks.tool_call(ToolCallDelta(0, "i", "f", '{"a": ')) + blocks.tool_call(ToolCallDelta(1, "i", "f", "[1]"))
    content = content_of(events + blocks.finish())
    assert [block["input"] for block in content] == [{"INVALID_JSON": '{"a": '}, {"INVALID_JSON": "[1]"}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 500) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "messages", "system", "tools", "tool_choice", "thinking", "stop_sequences", "output_config", "metadata", "max_tokens",
    "temperature", "top_k", "stream", "model", "container", "cache_control",
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
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, **changes}
            assert (await call(url, "POST", "/v1/messages", body)).status in (200, 400, 404), changes
