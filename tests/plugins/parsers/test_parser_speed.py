"""Time grows with the length of an answer and nothing else, however it comes."""

import time
from importlib import import_module

import pytest


def build(name):
    module = import_module(f"llmd_plugins.parsers.{name}")
    return module.llmd_register_tool_parsers()[0].build(None)


TEXTS = {
    "content": ("hermes", "word { x < y [z] " * 12_000),
    "arguments": ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "' + "é\\n x" * 40_000),
    "arguments before the name": ("hermes", '<tool_call>{"arguments": {"a": "' + "x" * 200_000),
    "openings": ("hermes", "<tool_call>" * 18_000),
    "openings in keys": ("hermes", '<tool_call>{"k":["' * 11_000),
    "white space": ("hermes", " " * 200_000),
    "numbers": ("hermes", '<tool_call>{"name": "now", "arguments": {"a": ' + "[" * 190 + "1," * 100_000),
    "lines": ("llama3_json", "\n{" * 100_000),
    "markup": ("qwen3_coder", "<function=f>\n<parameter=a>\n" + "[1, 2] </" * 22_000),
    "literals": ("pythonic", "[f(a='" + "some text\\n" * 20_000),
    "channels": ("openai", "<|channel|>analysis<|message|>" * 6_600),
}


@pytest.mark.parametrize("case", TEXTS)
def test_character_by_character(case):
    name, text = TEXTS[case]
    times = []
    longest = len(text) if case == "arguments" else 60_000  # characters
    for part in (text[: longest // 4], text[:longest]):
        parser = build(name)
        begin = time.process_time()
        shown = 0
        for char in part:
            shown += len(parser.feed(char))
        parser.finish()
        times.append(time.process_time() - begin)
    assert times[1] < 10 * times[0] + 0.5, times  # quadratic would be 16 times


@pytest.mark.parametrize("case", TEXTS)
def test_as_a_whole(case):
    name, text = TEXTS[case]
    parser = build(name)
    begin = time.process_time()
    parser.feed(text)
    parser.finish()
    assert time.process_time() - begin < 3
