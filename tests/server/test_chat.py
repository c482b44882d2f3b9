"""Conversations over a service that says what a script tells it, a character a token."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from server.scripted import EOS, ScriptedService

from llmd.checks import check_names
from llmd.config import Config, ModelConfig, PluginsConfig
from llmd.engine.params import BeamSearchParams, SamplingParams, StructuredOutputsParams
from llmd.errors import ConfigError, InvalidRequest, Overloaded
from llmd.plugin.catalog import build_catalog
from llmd.server.beam import beam_search
from llmd.server.chat import open_chat
from llmd.server.chat_types import ChatCall
from llmd.server.parsers import ModelParsers, ParserParts, choose_parsers, model_facts
from llmd.server.tool_plan import name_added_tokens
from llmd.text.chat_template import ChatTemplate
from llmd.text.structured import Constraint
from llmd_plugins.parsers import hermes, think

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
HERMES = hermes.llmd_register_tool_parsers()[0]
THINK = next(spec for spec in think.llmd_register_reasoning_parsers() if spec.name == "think")


def call_of(**fields):
    values = {"messages": [{"role": "user", "content": "Q"}], "params": SamplingParams(max_tokens=200), **fields}
    return ChatCall(**values)


async def whole(service, **fields):
    async with await open_chat(service, call_of(**fields), request_id="r") as chat:
        return await chat.collect(), chat


async def pieces(service, **fields):
    async with await open_chat(service, call_of(**fields), request_id="r") as chat:
        return [delta async for deltas in chat for delta in deltas], chat


def joined(deltas):
    """What a client puts together of a stream's first choice."""
    arguments = "".join(delta.tool_call.arguments for delta in deltas if delta.tool_call)
    names = [delta.tool_call.name for delta in deltas if delta.tool_call and delta.tool_call.name]
    content, reasoning = "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas)
    return content, reasoning, names, arguments, deltas[-1].finish_reason


async def test_plain_text_is_the_stream_itself():
    service = ScriptedService(lambda prompt, _: "hello")
    async with await open_chat(service, call_of(), request_id="r") as chat:
        assert chat.plain is service.streams[0]
    (answer,), chat = await whole(service)
    assert (answer.content, answer.finish_reason, chat.num_output_tokens) == ("hello", "stop", 6)
    deltas, _ = await pieces(service)
    assert joined(deltas) == ("hello", "", [], "", "stop")
    assert chat.prompt == "Q:"
    assert bytes(chat.prompt_token_ids).decode() == "Q:"


@pytest.mark.parametrize("asked", [True, False])
async def test_reasoning(asked):
    service = ScriptedService(lambda prompt, _: "<think>\nhm, so\n</think>\n\nyes", reasoning=THINK)
    (answer,), chat = await whole(service, include_reasoning=asked)
    assert (answer.reasoning, answer.content) == ("hm, so" if asked else "", "yes")
    assert chat.plain is None
    assert 6 <= chat.num_reasoning_tokens < chat.num_output_tokens
    deltas, _ = await pieces(service, include_reasoning=asked)
    assert joined(deltas)[:2] == (answer.content, answer.reasoning)


@pytest.mark.parametrize("parallel", [True, False])
async def test_tool_calls(parallel):
    service = ScriptedService(lambda prompt, _: f"I add.\n{CALL}\n{CALL}", tool=HERMES)
    fields = {"tools": [TOOL], "parallel_tool_calls": parallel}
    (answer,), _ = await whole(service, **fields)
    assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [("add", {"a": 1})] * (1 + parallel)
    assert (answer.content, answer.finish_reason) == ("I add.", "tool_calls")
    deltas, _ = await pieces(service, **fields)
    arguments = "".join(call.arguments for call in answer.tool_calls)
    assert joined(deltas) == ("I add.", "", ["add"] * (1 + parallel), arguments, "tool_calls")
    assert service.asked[0][2] is None
    assert service.asked[0][1].skip_special_tokens is False


async def test_a_call_that_was_cut_off_has_its_length_as_reason():
    service = ScriptedService(lambda prompt, _: CALL, tool=HERMES)
    (answer,), _ = await whole(service, tools=[TOOL], params=SamplingParams(max_tokens=len(CALL) - 20))
    assert (answer.tool_calls[0].name, answer.finish_reason) == ("add", "length")


@pytest.mark.parametrize("choice", ["required", "add"])
@pytest.mark.parametrize("tool", [HERMES, None])
async def test_forced_calls(choice, tool):
    service = ScriptedService(lambda prompt, constraint: CALL if constraint else "no", tool=tool)
    (answer,), _ = await whole(service, tools=[TOOL], tool_choice=choice)
    assert [call.name for call in answer.tool_calls] == ["add"]
    assert service.asked[0][2].kind == "lark"
    assert service.asked[0][2].param == "tool_choice"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "auto"}, "needs tools"),
        ({"tools": [TOOL]}, "tool_call_parser"),
        ({"tools": [TOOL], "tool_choice": "sub"}, "none of the tools: add"),
        (
            {
                "tools": [TOOL],
                "tool_choice": "add",
                "params": SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")),
            },
            "structured output",
        ),
    ],
)
async def test_tool_choices_that_cannot_be(fields, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        await whole(ScriptedService(lambda prompt, _: ""), **fields)
    assert caught.value.param == "tool_choice"


# --- thinking apart from the answer


def thinks(prompt, constraint):
    """Thinks, then answers; what stands behind the closing tag is the answer."""
    if "</think>" in prompt:
        return "[1]" if constraint else "yes"
    return "<think>\nlong thoughts\n</think>\n\nfree text"


async def test_the_grammar_begins_behind_the_thinking():
    service = ScriptedService(thinks, reasoning=THINK, tool=HERMES)
    service.script = lambda prompt, constraint: CALL if constraint else thinks(prompt, None)
    (answer,), chat = await whole(service, tools=[TOOL], tool_choice="required")
    assert (answer.reasoning, answer.content, answer.tool_calls[0].name) == ("long thoughts", "", "add")
    assert [constraint is None for *_, constraint in service.asked] == [True, False]
    assert service.asked[1][0] == "Q:<think>\nlong thoughts\n</think>"
    assert len(chat.prompt_token_ids) == 2
    assert len(answer.token_ids) == chat.num_output_tokens == len("<think>\nlong thoughts\n</think>" + CALL) + 1
    deltas, _ = await pieces(service, tools=[TOOL], tool_choice="required")
    assert joined(deltas)[1:] == ("long thoughts", ["add"], '{"a": 1}', "tool_calls")


async def test_an_answer_without_thinking_is_constrained_all_the_same():
    params = SamplingParams(max_tokens=50, structured_outputs=StructuredOutputsParams(regex="a+"))

    def script(prompt, constraint):
        return "aaa" if service.asked[-1][1].structured_outputs else "no thoughts"

    service = ScriptedService(script, reasoning=THINK)
    (answer,), chat = await whole(service, params=params)
    assert (answer.content, answer.reasoning, answer.token_ids) == ("aaa", "", [97, 97, 97, EOS])
    assert chat.num_output_tokens == 4
    assert [prompt for prompt, *_ in service.asked] == ["Q:", "Q:"]


async def test_a_prompt_with_closed_thinking_is_one_leg():
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    service = ScriptedService(lambda prompt, _: "aaa", reasoning=THINK, opening="<think>\n\n</think>\n\n")
    (answer,), _ = await whole(service, params=params)
    assert answer.content == "aaa"
    assert len(service.asked) == 1


@pytest.mark.parametrize(
    ("budget", "max_tokens", "reasoning", "content", "reason"),
    [
        (100, 200, "long thoughts", "yes", "stop"),
        (12, 200, "long", "yes", "stop"),
        (12, 14, "long", "ye", "length"),
        (12, 12, "long", "", "length"),
        (20, 10, "lo", "", "length"),
        (0, 200, "", "yes", "stop"),
    ],
)
async def test_thinking_budget(budget, max_tokens, reasoning, content, reason):
    service = ScriptedService(thinks, reasoning=THINK)
    fields = {"thinking_token_budget": budget, "params": SamplingParams(max_tokens=max_tokens)}
    (answer,), _ = await whole(service, **fields)
    assert (answer.reasoning, answer.content, answer.finish_reason) == (reasoning, content, reason)
    assert len(answer.token_ids) <= max_tokens
    if budget == 12 and max_tokens == 200:
        assert service.asked[1][0] == "Q:<think>\nlong\n</think>\n\n"
    deltas, _ = await pieces(service, **fields)
    assert joined(deltas)[:2] == (content, reasoning)


async def test_several_choices_with_a_budget():
    service = ScriptedService(thinks, reasoning=THINK)
    answers, _ = await whole(service, thinking_token_budget=50, params=SamplingParams(n=3, max_tokens=99, seed=7))
    assert [(answer.index, answer.reasoning, answer.content) for answer in answers] == [
        (index, "long thoughts", "yes") for index in range(3)
    ]
    assert sorted(params.seed for _, params, _ in service.asked) == [7, 7, 8, 8, 9, 9]


async def test_a_budget_needs_a_closing_tag():
    with pytest.raises(InvalidRequest, match="reasoning_parser") as caught:
        await whole(ScriptedService(lambda prompt, _: ""), thinking_token_budget=5)
    assert caught.value.param == "thinking_token_budget"


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (Overloaded("full", 1.0), "error"),
        (InvalidRequest("too long", code="context_length_exceeded"), "length"),
        (InvalidRequest("odd"), "error"),
    ],
)
async def test_an_answer_that_cannot_begin_is_an_end(refusal, reason):
    service = ScriptedService(lambda prompt, _: refusal if "</think>" in prompt else thinks(prompt, None), reasoning=THINK)
    (answer,), _ = await whole(service, thinking_token_budget=99)
    assert (answer.reasoning, answer.finish_reason) == ("long thoughts", reason)
    assert (answer.error is None) == (reason == "length")


async def test_closing_ends_both_legs():
    service = ScriptedService(thinks, reasoning=THINK)
    chat = await open_chat(service, call_of(thinking_token_budget=50), request_id="r")
    await anext(chat)
    chat.close()
    assert all(stream.is_closed for stream in service.streams)
    assert chat.is_finished
    with pytest.raises(StopAsyncIteration):
        await anext(chat)


async def test_news_can_be_listened_to():
    service = ScriptedService(thinks, reasoning=THINK)
    async with await open_chat(service, call_of(thinking_token_budget=50), request_id="r") as chat:
        found, done = [], asyncio.Event()

        def listen():
            found.extend(chat.take())
            if chat.is_finished:
                done.set()

        chat.listen(listen)
        await asyncio.wait_for(done.wait(), 5)
    assert joined(found)[:2] == ("yes", "long thoughts")


# --- what leads there


@pytest.mark.parametrize(
    ("effort", "expected"),
    [
        (None, {}),
        ("none", {"enable_thinking": False, "thinking": False}),
        ("low", {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}),
    ],
)
async def test_reasoning_effort_goes_to_the_template(effort, expected):
    service = ScriptedService(lambda prompt, _: "x")
    await whole(service, reasoning_effort=effort, chat_template_kwargs={"own": 1})
    told = {name: value for name, value in service.arguments.items() if name not in ("tools", "documents")}
    assert told == {**expected, "own": 1, "add_generation_prompt": True, "continue_final_message": False}


def test_added_tokens_are_named_by_their_ids():
    tokenizer = SimpleNamespace(added_tokens={7: "<tool_call>", 8: '"', 9: "|"})
    source = 'start: "a<tool_call>\\n" call ("|" call)\ncall: %json {"const": "<tool_call>"}'
    named = name_added_tokens(Constraint("grammar", source, "tool_choice"), tokenizer)
    assert named.source.split("\n")[0] == r'start: "a" <[7]> "\n" call (<[9]> call)'
    assert named.source.split("\n")[1] == source.split("\n")[1]
    regex = Constraint("regex", "<tool_call>")
    assert name_added_tokens(regex, tokenizer) is regex


def test_parsers_are_chosen(tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Q"]}')
    facts = model_facts(ModelConfig(model="m"), tmp_path, ChatTemplate("a <think>"))
    assert facts == {"model": "m", "chat_template": "a <think>", "model_type": "qwen3", "architectures": ("Q",)}
    assert model_facts(ModelConfig(), tmp_path / "none", ChatTemplate(""))["model_type"] is None
    parts = ParserParts({"hermes": HERMES}, {"think": THINK}, lambda facts: ("hermes", "unknown"))
    assert choose_parsers(parts, ModelConfig(), facts) == ModelParsers(HERMES, None)
    assert "unknown would fit" in caplog.text
    configured = ModelConfig(tool_call_parser="none", reasoning_parser="think")
    assert choose_parsers(parts, configured, facts) == ModelParsers(None, THINK)
    assert choose_parsers(ParserParts(), ModelConfig(), facts) == ModelParsers()
    with pytest.raises(ConfigError, match="tool_call_parser: 'x' is no parser; known: auto, none, hermes"):
        choose_parsers(parts, ModelConfig(tool_call_parser="x"), facts)


async def test_a_beam_that_is_refused_ends_the_search():
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    for refusal in (Overloaded("full", 1.0), InvalidRequest("odd")):
        with pytest.raises(type(refusal)):
            await beam_search(ScriptedService(lambda prompt, _, refusal=refusal: refusal), [81], params, request_id="r")


def test_a_parser_that_no_plugin_offers_is_a_mistake_of_the_configuration():
    catalog = build_catalog(PluginsConfig(autoload=False))
    for key, good in (("tool_call_parser", "hermes"), ("reasoning_parser", "qwen3")):
        for value in ("auto", "none", good):
            assert check_names(Config(models=(ModelConfig(**{key: value}),)), catalog) == []
        (problem,) = check_names(Config(models=(ModelConfig(**{key: "hermse"}),)), catalog)
        assert key in problem
