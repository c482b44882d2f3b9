"""Each reasoning format, alone and with a tool parser behind it."""

from importlib import import_module

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed import TOOLS, counted_ids, cut, parse

from llmd.text.parsers import ReplyParser

SPECS = {
    spec.name: spec
    for module in ("granite", "mistral", "openai", "think")
    for spec in import_module(f"llmd_plugins.parsers.{module}").llmd_register_reasoning_parsers()
}
TAGGED = ("think", "deepseek_r1", "deepseek_v3", "glm45", "kimi_k2", "minimax_m2", "qwen3", "granite", "mistral")
GRANITE = ("Here is my thought process:", "Here is my response:")
HARMONY = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")


def read(name, *chunks, prompt=""):
    return parse(SPECS[name].build(prompt), *chunks)


def both(whole):
    return whole.reasoning, whole.content


def test_every_format_is_tested():
    assert {*TAGGED, "openai_gptoss", "gpt_oss"} == set(SPECS)


@pytest.mark.parametrize("name", TAGGED)
def test_think_tags(name):
    assert both(read(name, "<think>\nHm, 2 < 3.\n</think>\n\nYes.\n")) == ("Hm, 2 < 3.", "Yes.\n")
    assert both(read(name, "<think>cut off")) == ("cut off", "")


@pytest.mark.parametrize(
    ("name", "tags"),
    [("granite", GRANITE), ("mistral", ("[THINK]", "[/THINK]")), ("openai_gptoss", HARMONY), ("gpt_oss", HARMONY)],
)
def test_own_tags(name, tags):
    text = f"{tags[0]}Hm.{tags[1]}Yes."
    assert both(read(name, text)) == both(read(name, *text)) == ("Hm.", "Yes.")


@pytest.mark.parametrize(
    ("name", "text", "prompt", "expected"),
    [
        ("deepseek_r1", "Hm.\n</think>\n\nYes.", "", ("Hm.", "Yes.")),
        ("deepseek_r1", "Yes.", "<think>\n\n</think>\n\n", ("", "Yes.")),
        ("deepseek_r1", "only this", "", ("only this", "")),
        ("minimax_m2", "Hm.</think>Yes.", "]~b]ai\n<think>\n", ("Hm.", "Yes.")),
        ("qwen3", "Yes.", "", ("", "Yes.")),
        ("qwen3", "Hm.</think>Yes.", "<|im_start|>assistant\n<think>\n", ("Hm.", "Yes.")),
        ("qwen3", "Yes.", "<|im_start|>assistant\n<think>\n\n</think>\n\n", ("", "Yes.")),
        ("qwen3", "The tag <think> begins it.", "", ("", "The tag <think> begins it.")),
        ("deepseek_v3", "Yes.", "<｜Assistant｜></think>", ("", "Yes.")),
        ("deepseek_v3", "Hm.</think>Yes.", "<｜Assistant｜><think>", ("Hm.", "Yes.")),
        ("kimi_k2", "<think>Hm.<|tool_calls_section_begin|>x", "", ("Hm.", "<|tool_calls_section_begin|>x")),
        ("qwen3", "<think>Hm.\n<tool_call>\n<function=f>", "", ("Hm.", "<tool_call>\n<function=f>")),
        ("granite", "<think>Hm.</think><response>Yes.\n</response>", "", ("Hm.", "Yes.")),
        ("granite", "<think>Hm.</think><response>Yes.\n", "", ("Hm.", "Yes.\n")),
        ("granite", "Here's my thought process: Hm. Here's my response:\nYes.", "", ("Hm.", "Yes.")),
        ("granite", "Here is my", "", ("", "Here is my")),
        ("openai_gptoss", "plain", "", ("", "plain")),
    ],
)
def test_particulars(name, text, prompt, expected):
    assert both(read(name, text, prompt=prompt)) == expected
    assert both(read(name, *text, prompt=prompt)) == expected


PARTS = [
    "<think>",
    "</think>",
    "\n",
    " ",
    "Hm",
    "<",
    "</think",
    "[THINK]",
    "[/THINK]",
    "<response>",
    "</response>",
    *GRANITE,
    *HARMONY,
]
PARTS += ["<|end|>", "<|tool_calls_section_begin|>", "<tool_call>\n<function=", "é🌧", "Here is my "]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_any_cut_gives_the_same(name):
    @settings(max_examples=120, deadline=None, database=None)
    @given(
        st.lists(st.sampled_from(PARTS), max_size=10).map("".join),
        st.lists(st.integers(0, 1 << 16), max_size=6),
        st.sampled_from(["", "<think>\n", "</think>"]),
    )
    def check(text, positions, prompt):
        whole = read(name, text, prompt=prompt)
        assert read(name, *cut(text, positions), prompt=prompt) == whole
        assert read(name, *text, prompt=prompt) == whole
        if not whole.reasoning and not SPECS[name].build().splits_reasoning and "<think>" not in prompt:
            assert whole.content in text

    check()


def reply(reasoning, tools):
    module, _, name = tools.partition(":")
    specs = {spec.name: spec for spec in import_module(f"llmd_plugins.parsers.{module}").llmd_register_tool_parsers()}
    return ReplyParser(SPECS[reasoning].build(), specs[name or module].build(TOOLS, make_id=counted_ids()))


@pytest.mark.parametrize(
    ("reasoning", "tools", "text"),
    [
        ("qwen3", "hermes", '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
        ("qwen3", "qwen3_coder", "<think>\nHm.\n\n<tool_call>\n<function=now>\n</function>\n</tool_call>"),
        ("openai_gptoss", "openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
                                    " to=functions.now <|constrain|>json<|message|>{}<|call|>"),
        ("mistral", "mistral", "[THINK]Hm.[/THINK][TOOL_CALLS]now[ARGS]{}"),
        ("deepseek_r1", "deepseek:deepseek_v31", "Hm.</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}"
                                                 "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    ],
)  # fmt: skip
def test_with_tools(reasoning, tools, text):
    whole = parse(reply(reasoning, tools), text)
    assert (whole.reasoning, whole.content, whole.calls) == ("Hm.", "", [("id0", "now", "{}")])
    assert parse(reply(reasoning, tools), *text) == whole


def test_who_needs_special_tokens():
    assert reply("qwen3", "hermes").needs_special_tokens
    assert not ReplyParser(SPECS["qwen3"].build()).needs_special_tokens
    assert ReplyParser(SPECS["mistral"].build()).needs_special_tokens
    assert ReplyParser(SPECS["openai_gptoss"].build()).needs_special_tokens
