"""The demo model behind /v1/messages and /v1/responses: real Hermes calls, a whole round with a tool."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import anthropic
import openai
from server.serving import make_context, serving

from llmd.config import Config
from llmd.daemon import build_service, load_catalog
from llmd_plugins import anthropic as anthropic_plugin
from llmd_plugins import responses as responses_plugin

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip
ASK = "What is the weather in Paris?"


@asynccontextmanager
async def demo():
    settings = Config.model_validate({"models": [{"dtype": "float32"}], "cache": {"kv_cache_bytes": 64 << 20}})
    service = build_service(settings, load_catalog(settings), settings.models[0])
    await service.start(lambda progress: None)
    context = make_context(
        service,
        config=settings,
        routes=[*anthropic_plugin.llmd_register_routes(), *responses_plugin.llmd_register_routes()],
        middlewares=anthropic_plugin.llmd_register_middlewares(),
        sections={"responses": responses_plugin.ResponsesSettings()},
    )
    try:
        async with serving(context) as url:
            yield url
    finally:
        await service.stop()


async def test_conversations():
    async with demo() as url:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as api:
            await _messages(api)
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as api:
            await _responses(api)


async def _messages(api):
    tool = {"name": "get_weather", "description": "The weather of a city", "input_schema": SCHEMA}
    messages = [{"role": "user", "content": ASK}]
    fields = {"model": "demo", "max_tokens": 60, "tools": [tool], "extra_body": {"temperature": 0}}
    asked = await api.messages.create(messages=messages, tool_choice={"type": "any"}, **fields)
    use = asked.content[-1]
    assert (asked.stop_reason, use.type, use.name) == ("tool_use", "tool_use", "get_weather")
    assert isinstance(use.input["city"], str)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": '{"weather": "sunny"}'}
    messages += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    whole = await api.messages.create(messages=messages, **fields)
    async with api.messages.stream(messages=messages, **fields) as stream:
        final = await stream.get_final_message()
    assert [block.type for block in whole.content] == [block.type for block in final.content]
    assert whole.content[-1].text == final.content[-1].text != ""
    counted = await api.messages.count_tokens(model="demo", messages=messages, tools=[tool])
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


async def _responses(api):
    tool = {"type": "function", "name": "get_weather", "description": "The weather of a city", "parameters": SCHEMA}
    fields = {"model": "demo", "max_output_tokens": 60, "temperature": 0, "tools": [tool]}
    asked = await api.responses.create(input=ASK, tool_choice="required", parallel_tool_calls=False, **fields)
    (use,) = asked.output
    assert (asked.status, use.type, use.name) == ("completed", "function_call", "get_weather")
    assert set(json.loads(use.arguments)) == {"city"}
    result = {"type": "function_call_output", "call_id": use.call_id, "output": '{"weather": "sunny"}'}
    whole = await api.responses.create(input=[result], previous_response_id=asked.id, **fields)
    async with api.responses.stream(input=[result], previous_response_id=asked.id, **fields) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert whole.output_text == final.output_text != ""
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
