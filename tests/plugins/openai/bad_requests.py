"""Requests that must be refused at the wire, each with the field that the refusal names."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "What is the weather in Paris?"}]
BIG = 1 << 40


class Bad(NamedTuple):
    """A request and its refusal. `param` None: the body as a whole is at fault."""

    name: str
    path: str
    body: bytes
    param: str | None
    status: int = 400


def _bad(name: str, path: str, body: Any, param: str | None, status: int = 400) -> Bad:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Bad(name, path, raw, param, status)


def _chat(name: str, param: str | None, status: int = 400, **fields: Any) -> Bad:
    return _bad(name, CHAT, {"model": "demo", "messages": HI, "max_tokens": 8, **fields}, param, status)


def _completion(name: str, param: str | None, status: int = 400, **fields: Any) -> Bad:
    return _bad(name, COMPLETIONS, {"model": "demo", "prompt": "Once", "max_tokens": 8, **fields}, param, status)


def _schema(name: str, schema: Any) -> Bad:
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _chat(name, "response_format", response_format=given)


def _tool(name: str = "f", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **parameters}}}


def _content(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def _nested(depth: int, inner: str = "1") -> str:
    return '{"a":' * depth + inner + "}" * depth


def _raw(fields: str, messages: str = json.dumps(HI)) -> bytes:
    return f'{{"model":"demo","messages":{messages},{fields}}}'.encode()


MANY_TOOLS = [
    {"type": "function", "function": {"name": f"f{i}", "description": "x" * 1200, "parameters": {"type": "object"}}}
    for i in range(900)
]
WIDE = {"anyOf": [{"type": "object", "properties": {f"k{j}": {"type": "string"} for j in range(9)}} for _ in range(3000)]}
LONG_ENUM = {"enum": [f"{i}" * 60 for i in range(4000)]}

# --- numbers out of bounds

NUMBERS = [
    *(_chat(f"n = {value}", "n", n=value) for value in (0, -1, 17, 129, BIG, 1.5, "2", True)),
    *(_chat(f"best_of = {value}", "best_of", best_of=value) for value in (0, 99, BIG)),
    *(_chat(f"temperature = {value}", "temperature", temperature=value) for value in (-1, 101, "hot", [], True)),
    _bad("temperature = NaN", CHAT, _raw('"temperature":NaN'), None),
    _bad("temperature = 1e999", CHAT, _raw('"temperature":1e999'), None),
    _bad("top_p = -Infinity", CHAT, _raw('"top_p":-Infinity'), None),
    *(_chat(f"top_p = {value}", "top_p", top_p=value) for value in (0, -0.1, 1.1)),
    *(_chat(f"top_k = {value}", "top_k", top_k=value) for value in (-2, BIG, 2.5)),
    *(_chat(f"min_p = {value}", "min_p", min_p=value) for value in (-0.1, 1.1)),
    *(_chat(f"{name} = 3", name, **{name: 3}) for name in ("presence_penalty", "frequency_penalty")),
    *(_chat(f"repetition_penalty = {value}", "repetition_penalty", repetition_penalty=value) for value in (0, -1, 1e9)),
    *(_chat(f"seed = {value}", "seed", seed=value) for value in (1 << 63, 1.5, "x")),
    *(_chat(f"max_tokens = {value}", "max_tokens", max_tokens=value) for value in (0, -1, BIG, 100_000)),
    _chat("max_completion_tokens = 0", "max_completion_tokens", max_tokens=None, max_completion_tokens=0),
    *(_chat(f"min_tokens = {value}", "min_tokens", min_tokens=value) for value in (-1, 9, 1 << 30, BIG)),
    *(_chat(f"top_logprobs = {value}", "top_logprobs", logprobs=True, top_logprobs=value) for value in (-1, 21, BIG)),
    *(_completion(f"logprobs = {value}", "logprobs", logprobs=value) for value in (-1, 21, 1.5)),
    *(_chat(f"prompt_logprobs = {value}", "prompt_logprobs", prompt_logprobs=value) for value in (-1, 21)),
    _chat("priority = 2^40", "priority", priority=BIG),
    _chat("a budget for a model that does not think", "thinking_token_budget", thinking_token_budget=5),
    _chat("thinking_token_budget = -1", "thinking_token_budget", thinking_token_budget=-1),
    _chat("truncate_prompt_tokens = -2", "truncate_prompt_tokens", truncate_prompt_tokens=-2),
    _chat("beam width 60", "n", use_beam_search=True, n=60, temperature=0),
    _chat("length_penalty without beams", "length_penalty", length_penalty=3),
]

# --- lists and maps that are too long, or hold what they may not

LISTS = [
    _chat("65 stop strings", "stop", stop=["x"] * 65),
    _chat("a long stop string", "stop", stop="x" * 1025),
    _chat("an empty stop string", "stop", stop=[""]),
    _chat("a stop number", "stop[0]", stop=[5]),
    _chat("257 stop tokens", "stop_token_ids", stop_token_ids=list(range(257))),
    *(_chat(f"stop token {value}", "stop_token_ids", stop_token_ids=[value]) for value in (-1, 1 << 30, BIG)),
    _chat("300 bad words", "bad_words", bad_words=["x"] * 300),
    _chat("a long bad word", "bad_words", bad_words=["x" * 1025]),
    _chat("no allowed token", "allowed_token_ids", allowed_token_ids=[]),
    *(_chat(f"allowed token {value}", "allowed_token_ids", allowed_token_ids=[5, value]) for value in (-1, 1 << 30)),
    _chat("a million allowed tokens", "allowed_token_ids", allowed_token_ids=[5] * 1_100_000),
    _chat("1025 biases", "logit_bias", logit_bias={str(i): 1 for i in range(1025)}),
    _chat("a bias of 101", "logit_bias", logit_bias={"5": 101}),
    _chat("a bias in words", "logit_bias.5", logit_bias={"5": "high"}),
    _bad("a NaN bias", CHAT, _raw('"logit_bias":{"5":NaN}'), None),
    _chat("a bias for a word", "logit_bias", logit_bias={"word": 1}),
    *(_chat(f"a bias for token {value}", "logit_bias", logit_bias={str(value): 1}) for value in (-1, 1 << 30, BIG)),
    _chat("2000 entries of metadata", "metadata", metadata={str(i): "x" for i in range(2000)}),
    _chat("2000 arguments of the template", "chat_template_kwargs",
          chat_template_kwargs={str(i): "x" for i in range(2000)}),
    _chat("2000 documents", "documents", documents=[{"text": "x"}] * 2000),
    _chat("2000 earlier calls", "messages[0].tool_calls", messages=[
        {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f"}}] * 2000}]),
    _chat("5000 messages", "messages", messages=HI * 5000),
    _chat("no message", "messages", messages=[]),
    _chat("metadata without bound", None, metadata={"a": "x" * (33 << 20)}, status=413),
]  # fmt: skip

# --- prompts

PROMPTS = [
    _completion("an empty prompt", "prompt", prompt=""),
    _completion("no prompts", "prompt", prompt=[]),
    _completion("257 prompts", "prompt", prompt=["x"] * 257),
    _completion("a million prompts", "prompt", prompt=["x"] * 1_000_000),
    _completion("a prompt of prompts of prompts", "prompt[0]", prompt=[[["x"]]]),
    _completion("mixed prompts", "prompt[0]", prompt=[5, "x"]),
    _completion("one empty prompt of three", "prompt", prompt=["x", "", "y"]),
    *(_completion(f"prompt token {value}", "prompt", prompt=[5, value]) for value in (-1, 100_000, BIG)),
    *(_completion(f"prompt token {value!r}", "prompt[0]", prompt=[5, value]) for value in (True, 2.5, None)),
    _completion("a million characters", "prompt", prompt="word " * 200_000),
    _completion("a million tokens", "prompt", prompt=[5] * 1_000_000),
    _completion("half a character", None, prompt="a\ud800"),
    _chat("a conversation of a million characters", "prompt", messages=[{"role": "user", "content": "x y " * 250_000}]),
    _completion("a suffix that is a number", "suffix", suffix=5),
    _completion("embedded prompts", "prompt_embeds", prompt_embeds="!!!not base64!!!"),
    _chat("an image", "messages[0].content[0].type",
          messages=_content({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@@"}})),
    _chat("audio", "messages[0].content[0].type",
          messages=_content({"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}})),
    _chat("a file", "messages[0].content[0].type",
          messages=_content({"type": "file", "file": {"file_data": "data:application/pdf;base64,===="}})),
    _chat("4000 parts that are nothing", "messages[0].content", messages=_content(*[{"type": "x"}] * 4000)),
    _chat("a role of its own", "messages[0].role", messages=[{"role": "root", "content": "x"}]),
]  # fmt: skip

# --- schemas, regular expressions, grammars

CONSTRAINTS = [
    _schema("a schema that is itself", {"$ref": "#"}),
    _schema("schemas that are each other", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                                            "$ref": "#/$defs/a"}),
    _schema("a schema from elsewhere", {"$ref": "http://127.0.0.1:1/x"}),
    _schema("a schema of no type", {"type": "foo"}),
    _schema("a schema of 3000 kinds", WIDE),
    _schema("a schema larger than any", {"description": "x" * 300_000}),
    _schema("a choice of 240 kB", {**LONG_ENUM, "minimum": "x"}),
    _schema("a schema 240 deep", json.loads(_nested(240, '{"type":"nothing"}').replace('"a"', '"items"'))),
    _schema("a pattern that is none", {"type": "string", "pattern": "(["}),
    _schema("lengths that cross", {"type": "string", "minLength": 5, "maxLength": 2, "type ": 1, "pattern": "(?<=x)"}),
    _chat("a regex bomb", "guided_regex", guided_regex="(a{1000}){1000}"),
    _chat("a regex bomb of three", "guided_regex", guided_regex="((a{300}){300}){300}"),
    _chat("a regex with a back reference", "guided_regex", guided_regex=r"(a)\1"),
    _chat("a regex of 400 kB", "guided_regex", guided_regex="a|" * 200_000),
    _chat("a regex that is none", "guided_regex", guided_regex="(a"),
    _chat("a regex 100,000 deep", "guided_regex", guided_regex="(" * 100_000 + "a" + ")" * 100_000),
    _chat("choices of 4 MB", "guided_choice", guided_choice=["x" * 1000] * 4000),
    _chat("5000 choices", "guided_choice", guided_choice=[str(i) for i in range(5000)]),
    _chat("no choice", "guided_choice", guided_choice=[]),
    _chat("a grammar that is itself", "guided_grammar", guided_grammar="start: start"),
    _chat("a grammar 5000 deep", "guided_grammar", guided_grammar="start: a\na: " + "(b|" * 5000),
    _chat("a grammar without a rule", "guided_grammar", guided_grammar="root ::= nothing"),
    _chat("a tag of nothing", "structured_outputs", structured_outputs={"structural_tag": "{}"}),
    _chat("a schema 10,000 deep in a string", "structured_outputs", structured_outputs={"json": _nested(10_000)}),
    _chat("two constraints", "structured_outputs", structured_outputs={"regex": "a", "choice": ["b"]}),
    _chat("a format of no kind", "response_format.type", response_format={"type": "xml"}),
    _bad("a schema 10,000 deep", CHAT, _raw('"guided_json":' + _nested(10_000)), None),
    _bad("a schema 10,000 deep in response_format", CHAT,
         _raw('"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":' + _nested(10_000) + "}}"), None),
]  # fmt: skip

# --- tools, templates, whole bodies

OTHERS = [
    _chat("tools of 1 MB", "prompt", tools=MANY_TOOLS),
    _chat("tools of 1 MB, one required", "prompt", tools=MANY_TOOLS, tool_choice="required"),
    _chat("2000 tools", "tools", tools=[_tool(f"f{i}") for i in range(2000)]),
    _chat("a tool that is no function", "tools[0].type", tools=[{"type": "x"}]),
    _chat("a tool without a name", "tools[0].function.name", tools=[_tool("")]),
    _chat("a strict tool without an end", "tool_choice", tools=[{"type": "function", "function": {
        "name": "f", "strict": True, "parameters": {"$ref": "#"}}}], tool_choice="required"),
    _chat("a choice that is no tool", "tool_choice", tools=[_tool()],
          tool_choice={"type": "function", "function": {"name": "nothing"}}),
    _bad("tools 10,000 deep", CHAT, _raw('"tools":[{"type":"function","function":{"name":"f","parameters":'
                                         + _nested(10_000) + "}}]"), None),
    _chat("a template of the request's own", "chat_template",
          chat_template="{% for i in range(10 ** 9) %}x{% endfor %}"),
    _chat("messages as a template's argument", "chat_template_kwargs.messages", chat_template_kwargs={"messages": []}),
    _chat("a field that nobody knows", "temprature", temprature=1),
    _chat("a name of 100 kB", "x" * 64, **{"x" * 100_000: 1}),
    _chat("a model that is not there", "model", status=404, model="gpt-4"),
    _chat("an id with spaces", "request_id", request_id="a b"),
    _chat("an id of 1 kB", "request_id", request_id="a" * 1000),
    _chat("an empty salt", "cache_salt", cache_salt=""),
    _bad("a body that is none", CHAT, b"", None),
    _bad("half a body", CHAT, _raw('"n":1')[:-5], None),
    _bad("no UTF-8", CHAT, b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', None),
    _bad("JSON 100,000 deep", CHAT, b"[" * 100_000, None),
    _bad("JSON 10,000 deep", CHAT, _raw('"metadata":' + _nested(10_000)), None),
    _bad("a number of 100,000 digits", CHAT, _raw('"seed":' + "9" * 100_000), None),
    _bad("a list for a body", CHAT, b"[]", None),
]  # fmt: skip

# --- the other routes

ROUTES = [
    _bad("no input", "/v1/embeddings", {"input": []}, "input"),
    _bad("3000 inputs", "/v1/embeddings", {"input": ["x"] * 3000}, "input"),
    _bad("input token -1", "/v1/embeddings", {"input": [5, -1]}, "input"),
    _bad("input token 2^30", "/v1/embeddings", {"input": [[5, 1 << 30]]}, "input"),
    _bad("dimensions = 0", "/v1/embeddings", {"input": "x", "dimensions": 0}, "dimensions"),
    _bad("dimensions = 2^40", "/v1/embeddings", {"input": "x", "dimensions": BIG}, "dimensions"),
    _bad("a format of no kind", "/v1/embeddings", {"input": "x", "encoding_format": "int3"}, "encoding_format"),
    _bad("documents without bound", "/v1/rerank", {"query": "x", "documents": ["y"] * 3000}, "documents"),
    _bad("a token that is none", "/detokenize", {"tokens": [1 << 30]}, "tokens[0]"),
    _bad("no tokens", "/detokenize", {"tokens": None}, "tokens"),
    _bad("a token below zero", "/detokenize", {"tokens": [-1]}, "tokens[0]"),
    _bad("messages of Anthropic, none", "/v1/messages", {"model": "demo", "max_tokens": 5, "messages": []}, "messages"),
    _bad("max_tokens of Anthropic", "/v1/messages", {"model": "demo", "max_tokens": 0, "messages": HI}, "max_tokens"),
    _bad("an input of no kind", "/v1/responses", {"model": "demo", "input": 5}, "input"),
    _bad("a background that is a word", "/v1/responses", {"model": "demo", "input": "x", "background": "y"}, "background"),
]

ALL = [*NUMBERS, *LISTS, *PROMPTS, *CONSTRAINTS, *OTHERS, *ROUTES]
