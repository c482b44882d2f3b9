"""Thinking as a leg of its own over the real service: its tokenizer, stop strings, grammars and prefix cache."""

from __future__ import annotations

import json

import pytest
from scripted import make_folder, scripted

from llmd.engine.params import SamplingParams, StructuredOutputsParams
from llmd.errors import InvalidRequest
from llmd.server.chat import open_chat
from llmd.server.chat_types import ChatCall

CHAT = [{"role": "user", "content": "How many?"}]
THOUGHT = "<think>\nMany words are thought of here, and more\n</think>"
TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"],
                       "additionalProperties": False},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("chat") / "model")


async def ask(folder, answer, *, stream=False, n=1, **fields):
    """The answers of a model that thinks, then says `answer`; and the stream they came from."""
    async with scripted(folder) as served:
        tag, thought, said = served.ids("</think>"), served.ids(THOUGHT), served.ids(answer)

        def choose(prompt):
            ends_thinking = any(prompt[start : start + len(tag)] == tag for start in range(len(prompt)))
            return said if ends_thinking else [*thought, *said]

        served.device.choose = choose
        params = fields.pop("params", None) or SamplingParams(temperature=0, max_tokens=200, n=n)
        call = ChatCall(messages=CHAT, params=params, **fields)
        async with await open_chat(served.service, call, request_id="r") as chat:
            answers = [delta async for deltas in chat for delta in deltas] if stream else await chat.collect()
        assert served.service.outputs.num_open == 0
        return answers, chat


async def test_without_a_constraint_it_is_one_leg(folder):
    (answer,), chat = await ask(folder, "Seven.")
    assert (answer.reasoning, answer.content) == ("Many words are thought of here, and more", "Seven.")
    assert chat.plain is None
    assert 0 < chat.num_reasoning_tokens < chat.num_output_tokens


@pytest.mark.parametrize("n", [1, 3])
async def test_a_schema_holds_the_answer_and_not_the_thinking(folder, n):
    wanted = StructuredOutputsParams(json={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    params = SamplingParams(temperature=0, max_tokens=200, n=n, structured_outputs=wanted)
    answers, chat = await ask(folder, '{"n": 7}', params=params)
    assert len(answers) == n
    for answer in answers:
        assert answer.reasoning == "Many words are thought of here, and more"
        assert json.loads(answer.content) == {"n": 7}
        assert answer.finish_reason == "stop"
    assert chat.num_output_tokens == sum(len(answer.token_ids) for answer in answers)


@pytest.mark.parametrize("choice", ["required", "count"])
async def test_a_forced_call_comes_behind_the_thinking(folder, choice):
    said = '<tool_call>\n{"name": "count", "arguments": {"n": 7}}\n</tool_call>'
    (answer,), _ = await ask(folder, said, tools=[TOOL], tool_choice=choice)
    assert answer.reasoning
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("count", '{"n": 7}')]
    assert (answer.content, answer.finish_reason) == ("", "tool_calls")


@pytest.mark.parametrize("budget", [0, 1, 5, 8, 12, 500])
async def test_a_budget_bounds_the_thinking(folder, budget):
    (answer,), chat = await ask(folder, "Seven.", thinking_token_budget=budget)
    whole = "Many words are thought of here, and more"
    assert whole.startswith(answer.reasoning)
    assert (answer.reasoning == whole) == (budget == 500)
    assert answer.content == "Seven."
    assert budget == 500 or chat.num_output_tokens <= budget + 8
    deltas, _ = await ask(folder, "Seven.", thinking_token_budget=budget, stream=True)
    assert "".join(delta.reasoning for delta in deltas) == answer.reasoning
    assert "".join(delta.content for delta in deltas) == "Seven."
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]


async def test_thinking_that_is_switched_off(folder):
    wanted = StructuredOutputsParams(choice=["six", "seven"])
    params = SamplingParams(temperature=0, max_tokens=50, structured_outputs=wanted)
    (answer,), _ = await ask(folder, "seven", params=params, reasoning_effort="none")
    assert (answer.reasoning, answer.content) == ("", "seven")


async def test_a_time_limit_covers_both_legs(folder):
    async with scripted(folder, step_s=0.02) as served:
        served.say(THOUGHT + "x" * 50)
        call = ChatCall(messages=CHAT, params=SamplingParams(temperature=0, max_tokens=400), thinking_token_budget=5)
        async with await open_chat(served.service, call, request_id="r", timeout_s=0.3) as chat:
            (answer,) = await chat.collect()
    assert answer.finish_reason == "timeout"


async def test_white_space_behind_separate_thinking_is_part_of_neither(folder):
    for stream in (False, True):
        deltas, _ = await ask(folder, "\n\nSeven.", stream=stream, thinking_token_budget=50)
        assert "".join(delta.content for delta in deltas) == "Seven."


async def test_a_schema_that_cannot_compile_is_refused_before_the_thinking(folder):
    params = SamplingParams(max_tokens=200, structured_outputs=StructuredOutputsParams(json={"type": "nothing"}))
    with pytest.raises(InvalidRequest, match="nothing"):
        await ask(folder, "7", params=params)
