"""Reasoning on the wire, and prompts with a suffix."""

from __future__ import annotations

import pytest
from server.scripted import ScriptedService
from server.serving import FakeService, call, events_of, make_context, serving

from llmd.errors import InvalidRequest
from llmd_plugins.openai.fim import fill_in
from llmd_plugins.parsers import hermes, think

HERMES = hermes.llmd_register_tool_parsers()[0]
THINK = next(spec for spec in think.llmd_register_reasoning_parsers() if spec.name == "think")
CHAT = {"messages": [{"role": "user", "content": "Q"}], "max_tokens": 300}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def thinker(answer="yes"):
    thought = "<think>\nhm, well\n</think>\n\n"
    return ScriptedService(
        lambda prompt, _: answer if "</think>" in prompt else thought + answer, tool=HERMES, reasoning=THINK
    )


async def ask(service, **fields):
    async with serving(make_context(service)) as url:
        whole = await call(url, "POST", "/v1/chat/completions", {**CHAT, **fields})
        events = await events_of(url, {**CHAT, **fields, "stream": True})
    assert whole.status == 200, whole.body
    return whole.json(), events


def joined(events, name):
    return "".join(event["choices"][0]["delta"].get(name) or "" for event in events)


async def test_reasoning_has_two_names():
    whole, events = await ask(thinker())
    message = whole["choices"][0]["message"]
    assert message == {
        "role": "assistant", "content": "yes", "refusal": None, "reasoning_content": "hm, well", "reasoning": "hm, well",
    }  # fmt: skip
    assert 0 < whole["usage"]["completion_tokens_details"]["reasoning_tokens"] < whole["usage"]["completion_tokens"]
    assert [joined(events, name) for name in ("reasoning_content", "reasoning", "content")] == ["hm, well"] * 2 + ["yes"]
    first = events[0]["choices"][0]["delta"]
    assert (first["role"], first["content"]) == ("assistant", None)
    assert sum("role" in event["choices"][0]["delta"] for event in events) == 1


async def test_reasoning_that_nobody_asked_for():
    whole, events = await ask(thinker(), include_reasoning=False)
    assert "reasoning" not in whole["choices"][0]["message"]
    assert joined(events, "reasoning") == ""
    assert joined(events, "content") == "yes"


async def test_reasoning_before_a_call():
    whole, events = await ask(thinker(CALL), tools=[TOOL])
    choice = whole["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning"] == "hm, well"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert choice["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(("budget", "reasoning"), [(100, "hm, well"), (11, "hm,"), (0, None)])
async def test_thinking_budget(budget, reasoning):
    whole, events = await ask(thinker(), thinking_token_budget=budget)
    assert whole["choices"][0]["message"].get("reasoning") == reasoning
    assert whole["choices"][0]["message"]["content"] == "yes"
    assert (joined(events, "reasoning") or None, joined(events, "content")) == (reasoning, "yes")


async def test_usage_of_a_budget_counts_both_legs():
    service = thinker()
    fields = {"thinking_token_budget": 100, "return_token_ids": True, "stream_options": {"include_usage": True}}
    async with serving(make_context(service)) as url:
        whole = (await call(url, "POST", "/v1/chat/completions", {**CHAT, **fields, "stream_options": None})).json()
        events = await events_of(url, {**CHAT, **fields, "stream": True})
    num_tokens = len(whole["choices"][0]["token_ids"])
    assert whole["usage"]["completion_tokens"] == events[-1]["usage"]["completion_tokens"] == num_tokens
    assert whole["usage"]["prompt_tokens"] == len(whole["prompt_token_ids"]) == 2


async def test_reasoning_effort_reaches_the_template():
    service = thinker()
    await ask(service, reasoning_effort="none")
    assert service.arguments["enable_thinking"] is False


# --- suffix


class Tokenizer:
    def __init__(self, *names):
        self.names = names

    def token_to_id(self, name):
        return 900 + self.names.index(name) if name in self.names else None

    def encode(self, text, *, add_special_tokens=True):
        return ([1] if add_special_tokens else []) + [ord(char) for char in text]

    async def encode_async(self, text, *, add_special_tokens=True):
        return self.encode(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize(
    "names",
    [
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("▁<PRE>", "▁<SUF>", "▁<MID>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ],
)
@pytest.mark.parametrize("special", [True, False])
async def test_a_suffix_fills_in_the_middle(names, special):
    service = FakeService(tokenizer=Tokenizer(*names))
    start = [1] if special else []
    assert await fill_in(service, "ab", "c", special) == [*start, 900, 97, 98, 901, 99, 902]
    assert await fill_in(service, [5, 6], "c", special) == [*start, 900, 5, 6, 901, 99, 902]


async def test_a_suffix_needs_a_model_that_knows_it():
    with pytest.raises(InvalidRequest) as caught:
        await fill_in(FakeService(tokenizer=Tokenizer("<fim_prefix>")), "a", "b", True)
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")
