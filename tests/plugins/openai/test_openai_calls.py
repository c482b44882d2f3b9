"""Tools, constraints, beams and the best of several with the demo model and the official client."""

from __future__ import annotations

import json
import re

import jsonschema
import openai
import pytest
import pytest_asyncio
from plugins.openai.demo_served import ASK, TOOLS, demo_served
from server.serving import call

pytestmark = pytest.mark.asyncio(loop_scope="module")
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
WEATHER = SCHEMAS["get_weather"]
NAMED = {"type": "function", "function": {"name": "add"}}
JSON = {"Content-Type": "application/json"}
BASE = {"model": "demo", "messages": ASK, "temperature": 0, "max_tokens": 80}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def demo():
    async with demo_served() as served:
        yield served


async def put_together(stream):
    """The choices of a stream as a whole answer has them: content, calls, reason."""
    choices = {}
    async for chunk in stream:
        for part in chunk.choices:
            choice = choices.setdefault(part.index, {"content": "", "calls": {}, "reason": None, "roles": 0})
            choice["roles"] += part.delta.role == "assistant"
            choice["content"] += part.delta.content or ""
            choice["reason"] = part.finish_reason or choice["reason"]
            for piece in part.delta.tool_calls or ():
                made = choice["calls"].setdefault(piece.index, {"name": "", "arguments": "", "ids": []})
                made["ids"] += [piece.id] if piece.id else []
                made["name"] += piece.function.name or ""
                made["arguments"] += piece.function.arguments or ""
    return choices


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": NAMED},
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": TOOLS, "parallel_tool_calls": False},
        {"tools": TOOLS, "tool_choice": "required", "n": 2, "temperature": 1, "seed": 5},
        {"tools": TOOLS, "max_tokens": 20},
        {"response_format": {"type": "json_object"}},
        {},
    ],
)
async def test_streamed_and_whole_answers_are_equal(demo, fields):
    client, _ = demo
    whole = await client.chat.completions.create(**{**BASE, **fields})
    streamed = await put_together(await client.chat.completions.create(**{**BASE, **fields}, stream=True))
    assert len(streamed) == len(whole.choices)
    for choice in whole.choices:
        parts = streamed[choice.index]
        calls = choice.message.tool_calls or []
        assert parts["content"] == (choice.message.content or "")
        assert [(made["name"], made["arguments"]) for made in parts["calls"].values()] == [
            (made.function.name, made.function.arguments) for made in calls
        ]
        assert all(len(made["ids"]) == 1 for made in parts["calls"].values())
        assert parts["reason"] == choice.finish_reason
        assert (choice.finish_reason == "tool_calls") <= bool(calls)
        assert parts["roles"] == 1


async def test_a_call_and_its_result(demo):
    client, _ = demo
    first = await client.chat.completions.create(**BASE, tools=TOOLS)
    (made,) = first.choices[0].message.tool_calls
    assert made.function.name == "get_weather"
    assert first.choices[0].finish_reason == "tool_calls"
    history = [*ASK, first.choices[0].message, {"role": "tool", "tool_call_id": made.id, "content": "sunny"}]
    second = await client.chat.completions.create(**{**BASE, "messages": history}, tools=TOOLS)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("parser", ["auto", "none"])
async def test_forced_arguments_follow_the_schema(demo, parser):
    async def check(client):
        for choice in ("required", NAMED):
            answer = await client.chat.completions.create(
                **{**BASE, "temperature": 1.3, "max_tokens": 120}, tools=TOOLS, tool_choice=choice, n=8, seed=3
            )
            finished = [choice for choice in answer.choices if choice.finish_reason == "tool_calls"]
            assert finished
            for made in (made for choice in finished for made in choice.message.tool_calls):
                jsonschema.validate(json.loads(made.function.arguments), SCHEMAS[made.function.name])

    if parser == "auto":
        await check(demo[0])
        return
    async with demo_served({"tool_call_parser": "none"}) as (client, _):
        await check(client)
        with pytest.raises(openai.BadRequestError, match="tool_call_parser"):
            await client.chat.completions.create(**BASE, tools=TOOLS)


async def test_strict_functions_are_called_as_their_schemas_say(demo):
    client, _ = demo
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    answer = await client.chat.completions.create(
        **{**BASE, "temperature": 1.0, "max_tokens": 120}, tools=strict, n=8, seed=2
    )
    calls = [
        made.function
        for choice in answer.choices
        if choice.finish_reason == "tool_calls"
        for made in choice.message.tool_calls
    ]
    assert calls
    for made in calls:
        jsonschema.validate(json.loads(made.arguments), SCHEMAS[made.name])
    hello = [{"role": "user", "content": "Hello"}]
    free = await client.chat.completions.create(**{**BASE, "messages": hello}, tools=strict)
    assert free.choices[0].message.content
    assert free.choices[0].finish_reason == "stop"


async def test_the_older_form(demo):
    client, _ = demo
    functions = [tool["function"] for tool in TOOLS]
    answer = await client.chat.completions.create(**BASE, functions=functions, function_call={"name": "add"})
    (choice,) = answer.choices
    assert choice.finish_reason == "function_call"
    assert choice.message.tool_calls is None
    jsonschema.validate(json.loads(choice.message.function_call.arguments), SCHEMAS["add"])
    stream = await client.chat.completions.create(**BASE, functions=functions, function_call={"name": "add"}, stream=True)
    pieces = [chunk.choices[0] async for chunk in stream]
    assert "".join(piece.delta.function_call.arguments for piece in pieces if piece.delta.function_call) == (
        choice.message.function_call.arguments
    )
    assert pieces[-1].finish_reason == "function_call"


# --- constraints


@pytest.mark.parametrize("strict", [True, False, None])
async def test_json_schema(demo, strict):
    client, _ = demo
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": strict}}
    answer = await client.chat.completions.create(
        **{**BASE, "temperature": 1, "max_tokens": 120}, response_format=form, n=4, seed=1
    )
    finished = [choice.message.content for choice in answer.choices if choice.finish_reason == "stop"]
    assert finished
    for content in finished:
        jsonschema.validate(json.loads(content), WEATHER)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_json": WEATHER}, r"\{.*\}"),
        ({"guided_json": json.dumps(WEATHER), "guided_decoding_backend": "xgrammar"}, r"\{.*\}"),
        ({"guided_regex": "[0-9]{4}"}, "[0-9]{4}"),
        ({"guided_choice": ["red", "dark green"]}, "red|dark green"),
        ({"guided_grammar": 'root ::= "x" | "y" tail\ntail ::= "x" | "z"'}, "x|y[xz]"),
        ({"structured_outputs": {"regex": "(ab){3}c"}}, "(ab){3}c"),
        ({"structured_outputs": {"json_object": True}}, r"\{.*\}"),
        ({"response_format": {"type": "json_object"}, "stop": ["}"], "include_stop_str_in_output": True}, r"\{[^}]*\}"),
    ],
)
@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_constraints(demo, path, fields, pattern):
    client, _ = demo
    if path == "chat":
        answer = await client.chat.completions.create(**{**BASE, "max_tokens": 120}, extra_body=fields, n=2)
        texts = [choice.message.content for choice in answer.choices]
    else:
        answer = await client.completions.create(
            model="demo", prompt=["One", "Two"], max_tokens=120, temperature=0, extra_body=fields
        )
        texts = [choice.text for choice in answer.choices]
    for text, choice in zip(texts, answer.choices, strict=True):
        assert choice.finish_reason == "length" or re.fullmatch(pattern, text, re.DOTALL), text
    if "object" not in str(fields):  # which may go on for ever
        assert any(choice.finish_reason == "stop" for choice in answer.choices)


# --- the best of several


async def test_beams_are_hugging_faces(demo):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from llmd_plugins.sources import demo_source

    client, _ = demo
    model = AutoModelForCausalLM.from_pretrained(demo_source.folder(), dtype=torch.float32).eval()
    prompt = [20, 300, 41, 7]
    for options in ({}, {"length_penalty": 2.0}, {"early_stopping": True, "length_penalty": 0.5}):
        found = model.generate(
            torch.tensor([prompt]), num_beams=4, num_return_sequences=3, max_new_tokens=12, do_sample=False,
            eos_token_id=2, pad_token_id=0, **options,
        )  # fmt: skip
        expected = [row[len(prompt) :] for row in found.tolist()]
        expected = [row[: row.index(2) + 1] if 2 in row else row for row in expected]
        answer = await client.completions.create(
            model="demo", prompt=prompt, max_tokens=12, n=3, best_of=4,
            extra_body={"use_beam_search": True, "return_token_ids": True, **options},
        )  # fmt: skip
        assert [choice.token_ids for choice in answer.choices] == expected
        assert answer.usage.completion_tokens == sum(map(len, expected))


async def test_beams_of_a_conversation(demo):
    client, _ = demo
    answer = await client.chat.completions.create(**{**BASE, "max_tokens": 8}, n=3, extra_body={"use_beam_search": True})
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    likeliest = await client.chat.completions.create(**{**BASE, "max_tokens": 8}, n=1, extra_body={"use_beam_search": True})
    greedy = await client.chat.completions.create(**{**BASE, "max_tokens": 8})
    assert likeliest.choices[0].message.content == greedy.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 0.5}, "temperature"), ({"stop": "x"}, "stop"), ({"logprobs": True}, "logprobs"),
        ({"top_p": 0.5}, "top_p"), ({"logit_bias": {"5": 1}}, "logit_bias"), ({"n": 40}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"), ({"max_tokens": None}, "max_tokens"),
        ({"tools": TOOLS, "tool_choice": "required"}, "use_beam_search"), ({"max_tokens": 5000}, "max_tokens"),
        ({"length_penalty": 99}, "length_penalty"),
    ],
)  # fmt: skip
async def test_what_beams_have_no_room_for(demo, fields, param):
    answer = await call(demo[1], "POST", "/v1/chat/completions", {**BASE, "use_beam_search": True, **fields})
    assert (answer.status, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_best_of_is_ranked_by_mean_logprob(demo, path):
    client, _ = demo
    sampled = {"model": "demo", "temperature": 1.0, "seed": 11, "max_tokens": 12}

    def mean(choice):
        logprobs = choice.logprobs.content if path == "chat" else choice.logprobs.token_logprobs
        values = [entry.logprob for entry in logprobs] if path == "chat" else logprobs
        return sum(values) / len(values)

    def text(choice):
        return choice.message.content if path == "chat" else choice.text

    if path == "chat":
        every = await client.chat.completions.create(messages=ASK, n=6, logprobs=True, **sampled)
        best = await client.chat.completions.create(messages=ASK, n=2, extra_body={"best_of": 6}, **sampled)
    else:
        every = await client.completions.create(prompt="Once", n=6, logprobs=0, **sampled)
        best = await client.completions.create(prompt="Once", n=2, best_of=6, **sampled)
    expected = sorted(every.choices, key=mean, reverse=True)[:2]
    assert [text(choice) for choice in best.choices] == [text(choice) for choice in expected]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage.completion_tokens == every.usage.completion_tokens
