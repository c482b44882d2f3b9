"""Every field of the official client's requests has a place: served, accepted without an effect, or refused by its name."""

from __future__ import annotations

from contextlib import asynccontextmanager
from importlib import import_module

import anthropic
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from scripted import make_folder, scripted
from server.serving import call, serving

from llmd_plugins import anthropic as plugin
from llmd_plugins.anthropic import messages
from llmd_plugins.anthropic.protocol import (
    UNSERVED,
    CountTokensRequest,
    MessagesRequest,
    Metadata,
    OutputConfig,
    OutputFormat,
    Thinking,
)

HEADERS = {"betas", "user_profile_id", "workspace_id"}  # which the client sends as headers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("anthropic") / "model")


@asynccontextmanager
async def client(folder):
    async with (
        scripted(folder, plugin) as model,
        serving(model.context) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="alpha", max_retries=0) as api,
    ):
        yield api, model, url


def fields(module, name):
    """What a class of the client's types has, its bases' fields among them."""
    found = getattr(import_module(f"anthropic.types.{module}"), name)
    return set(found.__annotations__)


def test_every_field_of_a_request_is_known():
    wanted = set(message_create_params.MessageCreateParamsBase.__annotations__)
    wanted |= set(beta_create_params.MessageCreateParamsBase.__annotations__)
    assert wanted - MessagesRequest.model_fields.keys() - UNSERVED.keys() <= HEADERS
    wanted = set(message_count_tokens_params.MessageCountTokensParams.__annotations__)
    assert wanted - CountTokensRequest.model_fields.keys() - UNSERVED.keys() <= HEADERS
    assert not UNSERVED.keys() & MessagesRequest.model_fields.keys()


@pytest.mark.parametrize(
    ("module", "name", "known"),
    [
        ("thinking_config_enabled_param", "ThinkingConfigEnabledParam", Thinking.model_fields),
        ("thinking_config_adaptive_param", "ThinkingConfigAdaptiveParam", Thinking.model_fields),
        ("output_config_param", "OutputConfigParam", OutputConfig.model_fields),
        ("json_output_format_param", "JSONOutputFormatParam", {"type", "schema", *OutputFormat.model_fields}),
        ("metadata_param", "MetadataParam", Metadata.model_fields),
        ("tool_param", "ToolParam", messages._TOOL_FIELDS),
        ("tool_choice_tool_param", "ToolChoiceToolParam", ("type", "name", "disable_parallel_tool_use")),
        ("text_block_param", "TextBlockParam", messages._BLOCKS["text"]),
        ("tool_use_block_param", "ToolUseBlockParam", messages._BLOCKS["tool_use"]),
        ("tool_result_block_param", "ToolResultBlockParam", messages._BLOCKS["tool_result"]),
        ("thinking_block_param", "ThinkingBlockParam", messages._BLOCKS["thinking"]),
        ("redacted_thinking_block_param", "RedactedThinkingBlockParam", messages._BLOCKS["redacted_thinking"]),
    ],
)
def test_every_field_within_is_known(module, name, known):
    assert fields(module, name) <= set(known)


async def test_what_is_accepted_without_an_effect(folder):
    async with client(folder) as (api, model, _):
        model.say("Hello!")
        cached = {"type": "ephemeral", "ttl": "1h"}
        answer = await api.messages.create(
            model="tiny", max_tokens=20, service_tier="standard_only", metadata={"user_id": "me"}, inference_geo="eu",
            system=[{"type": "text", "text": "Be brief", "cache_control": cached}, {"type": "text", "text": "and kind"}],
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": cached}]}],
            tools=[{
                "name": "add", "input_schema": {"type": "object"}, "cache_control": cached, "defer_loading": False,
                "allowed_callers": ["direct"], "eager_input_streaming": True, "input_examples": [{"a": 1}],
            }],
            tool_choice={"type": "none"}, thinking={"type": "disabled"}, cache_control=cached,
            extra_body={"top_k": 5, "priority": -1, "speed": "standard", "mcp_servers": []},
        )  # fmt: skip
        assert answer.content[0].text == "Hello!"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"container": "c"}, "container is not served"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers is not served"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses"}]}}, "context_management is not served"),
        ({"thread": {}}, "thread is not served"),
        ({"compaction": {}}, "compaction is not served"),
        ({"speed": "fast"}, "speed is not served"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "takes text only, no images"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "takes text only, no documents"),
        ({"system": [{"type": "image", "source": {}}]}, "takes text only, no images"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image", "source": {}}]}
            ]}]},
            r"messages[0].content[0].content[0].type is 'image', and this model takes text only",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "content[0].type must be one of"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "this server runs no tools of its own"),
        ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]}, "tools[0].defer_loading is not served"),
        ({"service_tier": "gold"}, "service_tier must be 'auto' or 'standard_only'"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is required"),
        ({"thinking": {"type": "adaptive", "display": "loud"}}, "thinking.display must be 'summarized' or 'omitted'"),
        ({"top_kk": 3}, "did you mean 'top_k'?"),
    ],
)  # fmt: skip
async def test_what_is_refused_by_name(folder, changes, words):
    async with client(folder) as (_, _, url):
        body = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}], **changes}
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            given = dict(body)
            if path.endswith("count_tokens"):
                if {"service_tier", "top_kk"} & given.keys():
                    continue
                del given["max_tokens"]
            answer = await call(url, "POST", path, given)
            error = answer.json()
            assert (answer.status, error["error"]["type"]) == (400, "invalid_request_error"), error
            assert words in error["error"]["message"]


async def test_counting_equals_the_answers_usage(folder):
    async with client(folder) as (api, model, _):
        model.say("Hello!")
        given = {
            "model": "tiny", "system": "Be brief", "messages": [{"role": "user", "content": "What is 1 + 2?"}],
            "tools": [{"name": "add", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}],
        }  # fmt: skip
        counted = await api.messages.count_tokens(**given)
        answer = await api.messages.create(**given, max_tokens=8)
        usage = answer.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
