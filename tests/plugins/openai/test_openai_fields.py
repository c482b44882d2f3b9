"""Fields: known and served, known and not, unknown; every refusal names the field."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from server.serving import FakeService, call, make_context, serving

from llmd.config import Config
from llmd.engine.params import StructuredOutputsParams
from llmd.errors import InvalidRequest
from llmd.server.fields import field_path
from llmd_plugins.openai import OpenAISettings
from llmd_plugins.openai.constraints import structured_of
from llmd_plugins.openai.fields import UNSERVED, parse
from llmd_plugins.openai.protocol import ChatRequest, CompletionRequest

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


async def post(body, path="/v1/chat/completions", **changes):
    async with serving(make_context(**changes)) as url:
        answer = await call(url, "POST", path, body)
    return answer.status, answer.json()


def refuse(model, body):
    with pytest.raises(InvalidRequest) as caught:
        parse(model, body)
    return caught.value


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "required"),
        ({"messages": None}, "messages", "list"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [1]}, "messages[0]", "object"),
        ({"messages": [*HI, {"content": "x"}]}, "messages[1].role", "one of system"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "one of"),
        ({"messages": [*HI, *HI, {"role": "user", "content": 3}]}, "messages[2].content", "string"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "string"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type", "'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "text only"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type", "text only"),
        ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "messages[0].nmae", "unknown field"),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name", "string"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
            "string",
        ),
        ({"messages": HI, "temperature": "hot"}, "temperature", "number"),
        ({"messages": HI, "temperature": True}, "temperature", "number"),
        ({"messages": HI, "max_tokens": 1.5}, "max_tokens", "integer"),
        ({"messages": HI, "max_tokens": "5"}, "max_tokens", "integer"),
        ({"messages": HI, "stream": "yes"}, "stream", "boolean"),
        ({"messages": HI, "stop": [1]}, "stop[0]", "string"),
        ({"messages": HI, "stop": {"a": 1}}, "stop", "list"),
        ({"messages": HI, "stop_token_ids": [1, "x"]}, "stop_token_ids[1]", "token id"),
        ({"messages": HI, "logit_bias": {"5": "x"}}, "logit_bias.5", "number"),
        ({"messages": HI, "tools": [1]}, "tools[0]", "object"),
        ({"messages": HI, "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "string"),
        ({"messages": HI, "tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "'none'"),
        ({"messages": HI, "tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"messages": HI, "stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"messages": HI, "stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
        ({"messages": HI, "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream=true"),
        ({"messages": HI, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1"),
        ({"messages": HI, "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater"),
        ({"messages": HI, "cache_salt": ""}, "cache_salt", "at least 1"),
        ({"messages": HI, "request_id": "a b"}, "request_id", "pattern"),
        ({"messages": HI, "priority": 1 << 40}, "priority", "less than"),
        ({"messages": HI, "add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "both"),
        ({"messages": HI, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"messages": HI, "max_token": 1}, "max_token", "did you mean 'max_tokens'"),
        ({"messages": HI, "guided_jsn": 1}, "guided_jsn", "did you mean 'guided_json'"),
        ({"messages": HI, "x" * 5000: 1}, "x" * 64, "unknown field"),
    ],
)
def test_chat_refusals(body, param, words):
    error = refuse(ChatRequest, body)
    assert error.param == param
    assert words in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"), ("missing", "prompt"), ([], "prompt"), ({}, "prompt"), (5, "prompt"), ([[]], "prompt[0]"),
        ([1, "a"], "prompt[0]"), ([1, True], "prompt[0]"), (["a", None], "prompt[1]"), ([[1], [2.5]], "prompt[1]"),
    ],
)  # fmt: skip
def test_prompt_refusals(prompt, param):
    error = refuse(CompletionRequest, {} if prompt == "missing" else {"prompt": prompt})
    assert error.param == param


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_fields_say_so(name):
    is_chats = name in ChatRequest.model_fields
    model, body = (CompletionRequest, {"prompt": "a"}) if is_chats else (ChatRequest, {"messages": HI})
    error = refuse(model, {**body, name: ["something"]})
    assert error.param == name
    assert error.code == "unsupported_parameter"
    assert name in error.message
    parse(model, {**body, name: None})


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}}, {"use_beam_search": False}, {"best_of": 2, "n": 2}, {"best_of": 1},
        {"suffix": ""}, {"length_penalty": 1.0}, {"modalities": ["text"]}, {"function_call": "none"},
        {"include_reasoning": True}, {"reasoning_effort": "none"},
    ],
)  # fmt: skip
def test_unserved_fields_that_ask_for_nothing_are_taken(fields):
    parse(CompletionRequest, {"prompt": "a", **fields})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"), ({"best_of": 0}, "best_of"), ({"best_of": 3, "stream": True}, "best_of"),
        ({"use_beam_search": True, "stream": True}, "use_beam_search"), ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"), ({"early_stopping": "later"}, "early_stopping.bool"),
        ({"suffix": "x", "echo": True}, "echo"), ({"suffix": 1}, "suffix"),
    ],
)  # fmt: skip
def test_fields_of_ranked_answers(fields, param):
    assert refuse(CompletionRequest, {"prompt": "a", **fields}).param == param


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "one of text"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "object"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", "object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
            "response_format.json_schema.strict",
            "true or false",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"rgx": "a"}}, "structured_outputs.rgx", "known: json"),
        ({"structured_outputs": {"regex": "a", "backend": "x"}}, "structured_outputs.backend", "not served"),
        ({"guided_choice": [1]}, "guided_choice[0]", "string"),
        ({"guided_regex": 1}, "guided_regex", "string"),
    ],
)  # fmt: skip
def test_constraints_that_are_wrong(fields, param, words):
    for model, body in ((CompletionRequest, {"prompt": "a"}), (ChatRequest, {"messages": HI})):
        error = refuse(model, {**body, **fields})
        assert error.param == param
        assert words in error.message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("response_format", {"json_object": True})),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}},
            ("response_format", {"json": {"type": "null"}}),
        ),
        ({"structured_outputs": {"choice": ["a"], "disable_fallback": True}}, ("structured_outputs", {"choice": ("a",)})),
        ({"guided_regex": "a", "guided_decoding_backend": "outlines"}, ("guided_regex", {"regex": "a"})),
        ({"guided_json": "{}"}, ("guided_json", {"json": "{}"})),
    ],
)  # fmt: skip
def test_constraints(fields, expected):
    found = structured_of(parse(ChatRequest, {"messages": HI, **fields}))
    if expected is None:
        assert found is None
    else:
        assert found == (expected[0], StructuredOutputsParams(**expected[1]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["x"] * 5000}, "guided_choice"),
        ({"structured_outputs": {"choice": ["x"] * 5000}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
    ],
)
def test_constraints_that_cannot_be(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        structured_of(parse(ChatRequest, {"messages": HI, **fields}))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [TOOL] * 2000}, "tools"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [{"name": "f"}], "tools": [TOOL]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ],
)
def test_tools_and_reasoning_that_are_wrong(fields, param):
    assert refuse(ChatRequest, {"messages": HI, **fields}).param == param


def test_the_older_form_of_calls_becomes_the_newer():
    history = [
        *HI,
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "2"},
    ]
    body = parse(ChatRequest, {"messages": history, "functions": [{"name": "f"}], "function_call": {"name": "f"}})
    assert body.functions == [{"type": "function", "function": {"name": "f"}}]
    assert body.function_call == "f"
    assert body.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert body.messages[2]["role"] == "tool"


def test_accepted_without_effect():
    accepted = {
        "user": "u", "metadata": {"a": [1]}, "store": True, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "parallel_tool_calls": True,
    }  # fmt: skip
    parse(ChatRequest, {"messages": HI, **accepted})
    parse(ChatRequest, {"messages": HI, **dict.fromkeys(accepted)})


def test_whole_floats_are_integers():
    assert parse(ChatRequest, {"messages": HI, "max_tokens": 5.0}).max_tokens == 5
    refuse(ChatRequest, {"messages": HI, "max_tokens": 1e300})


def test_a_million_wrong_entries_are_refused_at_once():
    started = time.process_time()
    for name in ("stop_token_ids", "bad_words", "allowed_token_ids"):
        refuse(ChatRequest, {"messages": HI, name: [{}] * 1_000_000})
    refuse(CompletionRequest, {"prompt": [{}] * 1_000_000})
    assert time.process_time() - started < 1.0


async def test_limits_of_the_operator():
    config = Config.model_validate({"limits": {"max_n": 2, "max_prompts": 2, "max_messages": 2, "max_logprobs": 3,
                                               "max_output_tokens": 5}})  # fmt: skip
    chat = [
        ({"messages": HI * 3}, "messages"), ({"messages": HI, "n": 3}, "n"),
        ({"messages": HI, "max_tokens": 6}, "max_tokens"),
        ({"messages": HI, "logprobs": True, "top_logprobs": 4}, "top_logprobs"),
    ]  # fmt: skip
    for body, param in chat:
        status, answer = await post(body, config=config)
        assert (status, answer["error"]["param"]) == (400, param)
    status, answer = await post({"prompt": ["a"] * 3}, "/v1/completions", config=config)
    assert (status, answer["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("choice", [None, "auto"])
async def test_tools_need_a_parser_unless_they_are_only_shown(choice):
    body = {"messages": HI, "tools": [TOOL], **({} if choice is None else {"tool_choice": choice})}
    status, answer = await post(body)
    assert status == 400
    assert answer["error"]["param"] == "tool_choice"
    assert "tool_call_parser" in answer["error"]["message"]


async def test_tool_choice_none_shows_the_tools_to_the_template():
    service = FakeService()
    status, _ = await post({"messages": HI, "tools": [TOOL], "tool_choice": "none"}, service=service)
    assert status == 200
    assert service.rendered[0][1]["tools"] == [TOOL]


async def test_chat_template_of_a_request_needs_trust():
    body = {"messages": HI, "chat_template": "{{ messages }}"}
    status, answer = await post(body)
    assert (status, answer["error"]["param"]) == (400, "chat_template")
    assert "trust_request_chat_template" in answer["error"]["message"]
    service = FakeService()
    trusting = {"openai": OpenAISettings(trust_request_chat_template=True)}
    assert (await post(body, service=service, sections=trusting))[0] == 200
    assert service.rendered[0][1]["chat_template"] == "{{ messages }}"


async def test_template_arguments_cannot_replace_the_requests_own():
    status, answer = await post({"messages": HI, "chat_template_kwargs": {"messages": []}})
    assert (status, answer["error"]["param"]) == (400, "chat_template_kwargs.messages")


async def test_continue_final_message():
    service = FakeService()
    body = {"messages": [*HI, {"role": "assistant", "content": "so"}], "continue_final_message": True}
    assert (await post(body, service=service))[0] == 200
    assert service.rendered[0][1]["continue_final_message"] is True
    assert service.rendered[0][1]["add_generation_prompt"] is False


@pytest.mark.parametrize(("template", "role"), [("{{ x }}", "system"), ("{% if developer %}", "developer")])
async def test_developer_is_system_where_the_template_does_not_know_it(template, role):
    service = FakeService(chat_template=SimpleNamespace(templates={"default": template}))
    assert (await post({"messages": [{"role": "developer", "content": "x"}]}, service=service))[0] == 200
    assert service.rendered[0][0][0]["role"] == role


async def test_truncation_keeps_the_end():
    service = FakeService()
    for limit, length in ((2, 2), (-1, 63), (1000, 100)):
        body = {"prompt": [5] * 98 + [6, 7], "truncate_prompt_tokens": limit, "max_tokens": 1}
        _status, answer = await post(body, "/v1/completions", service=service)
        if length == 100:
            assert answer["error"]["code"] == "context_length_exceeded"
        else:
            assert service.requests[-1].prompt.token_ids[-2:] == (6, 7)
            assert len(service.requests[-1].prompt) == length
    await post({"prompt": "a b c", "truncate_prompt_tokens": 2}, "/v1/completions", service=service)
    assert len(service.requests[-1].prompt) == 2


async def test_request_id_of_the_body():
    async with serving(make_context()) as url:
        answer = await call(url, "POST", "/v1/chat/completions", {"messages": HI, "request_id": "mine-1"})
    assert answer.json()["id"] == "chatcmpl-mine-1"
    assert answer.headers["X-Request-Id"] == "mine-1"


def test_field_path():
    assert field_path(("messages", 2, "content", 0, "text")) == "messages[2].content[0].text"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_beams_of_a_service_that_says_always_the_same(path):
    service = FakeService()
    start = {"messages": HI} if "chat" in path else {"prompt": ["a", [5, 6]]}
    body = {**start, "use_beam_search": True, "n": 2, "max_tokens": 3}
    status, answer = await post(body, path, service=service)
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 if "chat" in path else 4))
    assert answer["usage"]["completion_tokens"] == 3 * len(answer["choices"])
    assert len(service.closed) == len(service.streams)
