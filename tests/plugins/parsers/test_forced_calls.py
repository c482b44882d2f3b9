"""Grammars for tool_choice and strict functions: what they let through, the same plugin's parser reads, and it is valid."""

import json
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
from parsed import TOOLS, parse
from plugins.parsers.test_tool_formats import BOTH, SPECS
from walks import Walker, allowed, grammar_context

import llmd_plugins.sources.demo
from llmd.api.v1 import CallForm, Unforceable, forced_calls, json_call
from llmd.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")
FOLDER = Path(llmd_plugins.sources.demo.__file__).parent / "model"
ALL = sorted(name for name, spec in SPECS.items() if spec.form is not None)
NAMES = sorted({(id(SPECS[name].form), SPECS[name].build): name for name in ALL}.values())  # some have several names
# what ends a text that has no quotes around it
ENDINGS = ("\n</parameter>", "</parameter>", "</arg_value>", "</｜DSML｜parameter>", "<|end|>", "<|call|>")
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}, "name": {"type": "string"}}, "required": ["age"]}
HARD = [
    {
        "name": "add_people",
        "parameters": {
            "type": "object",
            "properties": {
                "people": {"type": "array", "items": {"$ref": "#/$defs/person"}, "maxItems": 2},
                "note": {"type": "string", "maxLength": 5},
                "kind": {"enum": ["a", "b c", "<d>"]},
                "level": {"enum": [1, 2.5, None, True, "x"]},
            },
            "required": ["people", "kind"],
            "additionalProperties": False,
            "$defs": {"person": PERSON},
        },
    },
    {
        "name": "book",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "count": {"type": "integer", "minimum": 3, "maximum": 12},
                "day": {"type": "string", "format": "date"},
                "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]+$"},
                "either": {"anyOf": [{"type": "string", "minLength": 2}, {"type": "null"},
                                     {"type": "number", "minimum": 5}]},
                "maybe": {"type": ["string", "null", "boolean"]},
                "who": {"$ref": "#/$defs/name"},
                "open": {"type": "object"},
                "list": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
                "exact": {"type": "boolean"},
                "any": {},
            },
            "required": ["count", "day", "code", "either", "who"],
            "$defs": {"name": {"type": "string", "maxLength": 4}},
        },
    },
    {"name": "now"},
]  # fmt: skip
SCHEMAS = {tool["name"]: tool.get("parameters", {}) for tool in HARD}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module")
def walker(tokenizer):
    return Walker(tokenizer)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    [spec] = import_module("llmd_plugins.grammars.llguidance").llmd_register_grammars()
    return spec.build(grammar_context(tokenizer))


def compiled(compiler, form, tools, choice, tokenizer=None, **options):
    added = tokenizer.added_tokens if tokenizer is not None else {}
    constraint = form.constraint(tools, choice, added_tokens=added, **options)
    assert constraint.kind == "lark"
    return compiler.compile(constraint.kind, constraint.source)


def valid(whole, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER):
    """Check the arguments of all calls."""
    for name, arguments in zip(whole.names, whole.arguments, strict=True):
        jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=format_checker).validate(arguments)
    return whole


def test_every_format_has_a_grammar():
    assert set(ALL) == set(SPECS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("choice", ["required", "add_people", "book"])
def test_forced_calls_are_read_and_valid(name, choice, compiler, tokenizer, walker):
    """With tags that are tokens of their own (the demo model's `<tool_call>`) and with tags that are text."""
    num_calls = 0
    for seed in range(2):
        grammar = compiled(compiler, SPECS[name].form, HARD, choice, tokenizer if seed % 2 else None)
        walk = walker.walk(grammar, seed, free=40, limit=600, forces=seed % 3 > 0, endings=ENDINGS)
        if walk.is_finished:
            whole = valid(parse(SPECS[name].build(HARD), tokenizer.decode(walk.token_ids, skip_special_tokens=False)))
            assert (whole.content.strip() == "") or name == "openai"
            assert set(whole.names) <= (set(SCHEMAS) if choice == "required" else {choice})
            assert len(whole.calls) == 1 if choice != "required" else 1 <= len(whole.calls) <= 16
            assert len({call_id for call_id, _, _ in whole.calls}) == len(whole.calls)
            num_calls += len(whole.calls)
    assert num_calls


@pytest.mark.parametrize("name", NAMES)
def test_parallel_calls_can_be_barred(name, compiler, tokenizer, walker):
    for choice in ("required", "auto"):
        grammar = compiled(compiler, SPECS[name].form, HARD[2:], choice, parallel=False)
        for seed in range(2):
            walk = walker.walk(grammar, seed, free=20, endings=ENDINGS)
            whole = parse(SPECS[name].build(HARD), tokenizer.decode(walk.token_ids))
            assert walk.is_finished
            assert len(whole.calls) == 1 or choice == "auto"


@pytest.mark.parametrize("name", NAMES)
def test_strict_calls_may_come_and_are_valid(name, compiler, tokenizer, walker):
    """Free text, in which whatever the parser would take for a call follows its schema."""
    spec = SPECS[name]
    grammar = compiled(compiler, spec.form, HARD, "auto", tokenizer)
    texts, num_calls = [], 0
    for seed in range(2):
        walk = walker.walk(grammar, seed, free=30, limit=600, endings=ENDINGS)
        text = tokenizer.decode(walk.token_ids, skip_special_tokens=False)
        if walk.is_finished:
            texts.append(text)
    for text in texts:
        num_calls += len(valid(parse(spec.build(HARD), text)).calls)
    for opening in (*spec.form.opens, *spec.form.starts):  # begin a call: nothing but a call may follow
        matcher = grammar.matcher()
        ids = tokenizer.encode(opening, add_special_tokens=False)
        if not matcher.accept(ids):
            continue
        walk = walker.walk(_Begun(matcher), 7, free=30, limit=600, forces=False, endings=ENDINGS)
        if walk.is_finished:
            text = tokenizer.decode([*ids, *walk.token_ids], skip_special_tokens=False)
            assert valid(parse(spec.build(HARD), text)).calls or name == "openai", text


class _Begun:
    """A grammar whose only matcher has begun already."""

    def __init__(self, matcher):
        self._matcher = matcher

    def matcher(self):
        return self._matcher


@pytest.mark.parametrize("name", NAMES)
def test_free_text_stays_free_under_auto(name, compiler, tokenizer):
    grammar = compiled(compiler, SPECS[name].form, HARD, "auto", tokenizer)
    said = 'I think < 3 is "fine": {"a": [1]}\n\nYes.'
    text = f"<|channel|>final<|message|>{said}" if name == "openai" else said
    matcher = grammar.matcher()
    assert matcher.accept(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.eos_token_id in allowed(matcher, tokenizer.vocab_size)
    assert parse(SPECS[name].build(HARD), text).content == said


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v31", "hermes", "jamba", "kimi_k2", "mistral", "qwen3_coder"])
def test_the_way_templates_write_calls_is_allowed(name, compiler, tokenizer):
    text = (
        BOTH[name].strip() if name != "jamba" else BOTH[name].replace("\n  ", "").replace("\n]", "]").replace("}\n{", "}, {")
    )
    text = text.replace("🌧", "u").replace('\\"', "'").replace('"{}"', "x")
    for choice in ("required", "auto"):
        matcher = compiled(compiler, SPECS[name].form, TOOLS, choice, tokenizer).matcher()
        assert matcher.accept(tokenizer.encode(text, add_special_tokens=False)), text
        assert matcher.finished or tokenizer.eos_token_id in allowed(matcher, tokenizer.vocab_size)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_choose_from(name):
    assert SPECS[name].form.constraint([], "required") is None
    assert SPECS[name].form.constraint(TOOLS, "unknown") is None


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"properties": {"a": {"type": "string", "format": "hostname"}}}, "format 'hostname'"),
        ({"properties": {"a": {"allOf": [{"type": "string"}]}}}, "type of the argument 'a' is not said"),
        ({"properties": {"a": {"type": "string", "pattern": "a(^b|c$)"}}}, "anchors"),
        ({"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}, "anchors"),
        ({"properties": {"a b>": {"type": "string"}}}, "argument's name"),
        ({"properties": {}, "anyOf": [{"required": ["a"]}]}, "'anyOf' beside the properties"),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "string"}}}, r"\$ref"),
        ({"properties": {}, "required": ["a"], "additionalProperties": False}, "'a' is not described"),
        ({"properties": {"a": {"enum": ["</parameter>"]}}}, "no value of the argument"),
    ],
)
def test_what_markup_cannot_hold_is_told(parameters, reason):
    with pytest.raises(Unforceable, match=reason):
        SPECS["qwen3_coder"].form.constraint([{"name": "f", "parameters": parameters}], "required")


def test_names_that_a_format_cannot_write_are_told():
    for name in ("qwen3_coder", "kimi_k2", "pythonic", "deepseek_v3"):
        with pytest.raises(Unforceable, match="name"):
            SPECS[name].form.constraint([{"name": "a b"}], "required")


def test_the_short_way_for_other_plugins(compiler, tokenizer, walker):
    constraint = forced_calls(HARD, "now", call=lambda name, arguments: [f"call {name} ", arguments, "!"], begin=">")
    grammar = compiler.compile(constraint.kind, constraint.source)
    assert tokenizer.decode(walker.walk(grammar, 1, haste=1, free=0).token_ids).startswith(">call now {")
    form = CallForm(call=json_call("{name}#{number} ", ";"), is_numbered=True)
    text = tokenizer.decode(walker.walk(compiled(compiler, form, HARD[2:], "required"), 3).token_ids)
    assert json.loads(text.split(";")[0].partition(" ")[2]) is not None
