"""Grammars for tool_choice: what they let through is what the same plugin's parser reads, and it follows the schema."""

import json
import random
from importlib import import_module

import pytest
from parsed import TOOLS, parse

llguidance = pytest.importorskip("llguidance")
NAMES = ("hermes", "llama3_json", "mistral")
PEOPLE = {
    "name": "add_people",
    "parameters": {
        "type": "object",
        "properties": {"people": {"type": "array", "items": {"$ref": "#/$defs/person"}, "maxItems": 2}},
        "required": ["people"],
        "additionalProperties": False,
        "$defs": {"person": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}},
    },
}


def spec_of(name):
    return import_module(f"llmd_plugins.parsers.{name}").llmd_register_tool_parsers()[0]


def start(constraint):
    assert constraint.kind == "grammar"
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), llguidance.grammar_from("grammar", constraint.source))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def write(matcher, seed, max_bytes=1500):
    """Some text the grammar allows, likelier to close what is open than to go on."""
    chooser = random.Random(seed)
    out = bytearray()
    while not matcher.is_stopped() and len(out) < max_bytes:
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(len(mask) * 8) if mask[token // 8] >> (token % 8) & 1]
        closing = [token for token in allowed if token in {*b'"}]>\n'} or token > 255]
        plain = [token for token in allowed if 32 <= token < 127]
        token = chooser.choice(closing if closing and chooser.random() < 0.6 else plain or allowed)
        matcher.consume_token(token)
        if token < 256:
            out.append(token)
    return out.decode()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("choice", ["required", "get_weather", "add_people"])
def test_what_the_grammar_allows_is_read(name, choice):
    spec, tools = spec_of(name), [*TOOLS, PEOPLE]
    for seed in range(3):
        matcher = start(spec.constrain(tools, choice))
        whole = parse(spec.build(tools), write(matcher, seed))
        assert whole.content == ""
        assert len(whole.calls) == 1 if choice != "required" else 1 <= len(whole.calls) <= 16
        if matcher.is_stopped():
            known = {"get_weather", "now", "write-file.v2", "add_people"} if choice == "required" else {choice}
            assert set(whole.names) <= known
            for call_name, arguments in zip(whole.names, whole.arguments, strict=True):
                assert call_name != "get_weather" or isinstance(arguments["city"], str)
                assert call_name != "add_people" or all(isinstance(each["age"], int) for each in arguments["people"])


@pytest.mark.parametrize("name", NAMES)
def test_the_way_templates_write_calls_is_allowed(name):
    call = json.dumps({"name": "get_weather", "X": {"city": "Oslo", "days": 3}})
    text = {
        "hermes": f"<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{call}\n</tool_call>".replace("X", "arguments"),
        "llama3_json": f"{call}; {call}".replace("X", "parameters"),
        "mistral": f"[TOOL_CALLS][{call}, {call}]".replace("X", "arguments"),
    }[name]
    matcher = start(spec_of(name).constrain(TOOLS, "required"))
    assert matcher.consume_tokens(list(text.encode())), matcher.get_error()
    assert matcher.is_accepting()
    assert parse(spec_of(name).build(TOOLS), text).names == ["get_weather"] * 2


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_choose_from(name):
    assert spec_of(name).constrain([], "required") is None
    assert spec_of(name).constrain(TOOLS, "unknown") is None
