"""Every kind of constraint through both routes: whole and streamed, several choices, stop strings, a cached prompt."""

from __future__ import annotations

import json
import re

import jsonschema
import openai
import pytest
import pytest_asyncio
from plugins.openai.demo_served import ASK, TOOLS, demo_served

pytestmark = pytest.mark.asyncio(loop_scope="module")
SMALL = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"],
         "additionalProperties": False}  # fmt: skip
TAGS = [{"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": SMALL}, "end": "</f>"}]
OLDER = {"structures": [{"begin": "<f>", "schema": SMALL, "end": "</f>"}], "triggers": ["<f>"]}
NEWER = {
    "type": "structural_tag",
    "format": {"type": "sequence", "elements": [{"type": "const_string", "value": "so: "}, *TAGS]},
}
FREE = r"(?s:(?!.*<f>).*|.*<f>\{\"a\":\s*\d+\s*\}</f>.*)"
KINDS = {
    "json": ({"structured_outputs": {"json": SMALL}}, r"\{\s*\"a\"\s*:\s*[0-9]{1,2}\s*\}"),
    "json text": ({"structured_outputs": {"json": json.dumps(SMALL)}}, r"\{\s*\"a\"\s*:\s*[0-9]{1,2}\s*\}"),
    "response_format": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SMALL}}},
        r"\{\s*\"a\"\s*:\s*[0-9]{1,2}\s*\}",
    ),
    "json_object": ({"response_format": {"type": "json_object"}}, r"(?s)\{.*\}"),
    "regex": ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]+"}}, "[a-c]{3}-[0-9]+"),
    "choice": ({"structured_outputs": {"choice": ["red", "dark green", "é"]}}, "red|dark green|é"),
    "ebnf": ({"structured_outputs": {"grammar": 'root ::= "x" | "y" tail\ntail ::= [0-9] "z"'}}, "x|y[0-9]z"),
    "lark": ({"structured_outputs": {"grammar": 'start: "x" | "y" TAIL\nTAIL: /[0-9]z/'}}, "x|y[0-9]z"),
    "older tag": ({"structured_outputs": {"structural_tag": json.dumps(OLDER)}}, FREE),
    "older tag as format": ({"response_format": {"type": "structural_tag", **OLDER}}, FREE),
    "newer tag": ({"response_format": NEWER}, r"so: <f>\{\s*\"a\"\s*:\s*[0-9]{1,2}\s*\}</f>"),
    "guided_json": ({"guided_json": SMALL}, r"\{\s*\"a\"\s*:\s*[0-9]{1,2}\s*\}"),
    "guided_regex": ({"guided_regex": "(ab){3}c"}, "(ab){3}c"),
    "guided_choice": ({"guided_choice": ["red", "blue"]}, "red|blue"),
    "guided_grammar": ({"guided_grammar": 'root ::= "a" "b"*'}, "ab*"),
    "special token": ({"structured_outputs": {"regex": r"a<\|im_end\|>b"}}, r"a<\|im_end\|>b"),
    "special choice": ({"structured_outputs": {"choice": ["<|im_end|>", "<tool_call>"]}}, r"<\|im_end\|>|<tool_call>"),
    "special grammar": ({"structured_outputs": {"grammar": 'root ::= "<|im_start|>" "x"'}}, r"<\|im_start\|>x"),
    "special json": ({"structured_outputs": {"json": {"const": "<|im_end|>"}}}, r'"<\|im_end\|>"'),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["llguidance", "xgrammar"])
async def served(request):
    if request.param == "xgrammar":
        pytest.importorskip("xgrammar")
    async with demo_served({"structured_outputs_backend": request.param}) as (client, _):
        yield request.param, client


async def asked(client, path, fields, **more):
    """Texts and reasons of all choices, whole."""
    values = {"model": "demo", "max_tokens": 60, "temperature": 1, "seed": 4, "n": 2, **more}
    if path == "chat":
        answer = await client.chat.completions.create(messages=ASK, extra_body=fields, **values)
        return [(choice.message.content, choice.finish_reason) for choice in answer.choices]
    answer = await client.completions.create(prompt="One two", extra_body=fields, **values)
    return [(choice.text, choice.finish_reason) for choice in answer.choices]


async def streamed(client, path, fields, **more):
    """The same, put together of a stream."""
    values = {"model": "demo", "max_tokens": 60, "temperature": 1, "seed": 4, "n": 2, "stream": True, **more}
    if path == "chat":
        stream = await client.chat.completions.create(messages=ASK, extra_body=fields, **values)
    else:
        stream = await client.completions.create(prompt="One two", extra_body=fields, **values)
    texts, reasons = {}, {}
    async for chunk in stream:
        for choice in chunk.choices:
            text = choice.delta.content if path == "chat" else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return [(texts[index], reasons[index]) for index in sorted(texts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_answers_follow(served, path, kind):
    backend, client = served
    fields, pattern = KINDS[kind]
    if (kind == "lark" and backend == "xgrammar") or (path == "completions" and "tag as format" in kind):
        pytest.skip("it takes EBNF only" if kind == "lark" else "the route has no response_format")
    if backend == "xgrammar" and path == "completions":
        pytest.skip("the path makes no difference to the backend")
    found = await asked(client, path, fields)
    assert len(found) == 2
    for text, reason in found:
        assert (reason == "stop" and re.fullmatch(pattern, text)) or reason == "length", text
    if kind not in ("json_object",) and "tag" not in kind:
        assert any(reason == "stop" for _, reason in found)
    assert await streamed(client, path, fields) == found


async def test_lark_is_refused_where_only_ebnf_is_taken(served):
    backend, client = served
    if backend == "xgrammar":
        with pytest.raises(openai.BadRequestError, match="cannot be used"):
            await asked(client, "chat", KINDS["lark"][0])
    else:
        assert await asked(client, "chat", KINDS["lark"][0])


@pytest.mark.parametrize("stop", [["}"], ["a"], ["-", "b"]])
async def test_stop_strings_end_what_a_grammar_would_go_on_with(served, stop):
    _, client = served
    for text, reason in await asked(client, "chat", {"structured_outputs": {"regex": "[ab]{2}-[0-9]{50}}"}}, stop=stop):
        assert reason in ("stop", "length")
        assert not any(word in text for word in stop)


async def test_a_cached_prompt_changes_nothing(served):
    _, client = served
    fields = {"structured_outputs": {"json": SMALL}}
    answers = [await asked(client, "completions", fields, temperature=0) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


async def test_forced_calls_come_with_either_backend(served):
    _, client = served
    for parallel in (True, False):
        answer = await client.chat.completions.create(
            model="demo", messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=150, seed=2, temperature=1, n=4,
            parallel_tool_calls=parallel,
        )  # fmt: skip
        for choice in answer.choices:
            calls = choice.message.tool_calls or []
            assert parallel or len(calls) <= 1
            for made in calls if choice.finish_reason == "tool_calls" else ():
                schema = next(tool["function"] for tool in TOOLS if tool["function"]["name"] == made.function.name)
                jsonschema.validate(json.loads(made.function.arguments), schema["parameters"])


@pytest.mark.parametrize("parser", ["qwen3_coder", "llama3_json", "pythonic", "glm45", "openai"])
async def test_strict_functions_in_other_formats(parser):
    """Refused by name, or held: never served as if they were not strict."""
    good = {**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}
    bad = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {
        "type": "object", "properties": {"host": {"type": "string", "format": "no-such"}}}}}  # fmt: skip
    async with demo_served({"tool_call_parser": parser}) as (client, _):
        values = {"model": "demo", "messages": ASK, "max_tokens": 100, "temperature": 1, "seed": 3, "n": 4}
        answer = await client.chat.completions.create(tools=[good], **values)
        for choice in answer.choices:
            for made in choice.message.tool_calls or () if choice.finish_reason == "tool_calls" else ():
                jsonschema.validate(json.loads(made.function.arguments), good["function"]["parameters"])
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(tools=[bad], **values)
        assert refused.value.param == "tools"
        assert "no-such" in str(refused.value)
        forced = await client.chat.completions.create(
            tools=[good], tool_choice={"type": "function", "function": {"name": "get_weather"}}, **values
        )
        for choice in forced.choices:
            assert choice.finish_reason == "length" or len(choice.message.tool_calls) == 1
