"""200 JSON schemas: whatever a model says under their grammars is valid once it ends, and can still become it before."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
from jsonschema import Draft202012Validator
from walks import Walker, allowed, grammar_context

import llmd_plugins.sources.demo
from llmd.text.tokenizer import Tokenizer
from llmd_plugins.grammars import llguidance, xgrammar

FOLDER = Path(llmd_plugins.sources.demo.__file__).parent / "model"
SCHEMAS = json.loads((Path(__file__).parents[2] / "schemas" / "schemas.json").read_text(encoding="utf-8"))
CHECKER = Draft202012Validator.FORMAT_CHECKER
# what xgrammar would take more loosely, and the word of the refusal that names it; llguidance takes all 200
REFUSED = {
    **{f"multiples-{level}": "multipleOf" for level in range(1, 10)},
    **{f"together-{level}": "allOf" for level in range(1, 10)},
    **{f"references-{level}": "ref" for level in (8, 9)},
    "patterns-2": "minLength",
    "patterns-6": "pattern",
    "open_objects-5": "additionalProperties",
    "open_objects-8": "patternProperties",
    "references-10": "ref",
}
INTEGER = {"type": "integer"}
NAMED = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module")
def walker(tokenizer) -> Walker:
    return Walker(tokenizer)


@pytest.fixture(scope="module", params=[llguidance, xgrammar], ids=["llguidance", "xgrammar"])
def compiler(request, tokenizer):
    if request.param is xgrammar:
        pytest.importorskip("xgrammar")
    [spec] = request.param.llmd_register_grammars()
    return spec.build(grammar_context(tokenizer))


def refused_by(compiler):
    return REFUSED if isinstance(compiler, xgrammar.XgrammarCompiler) else {}


def takes(compiler, tokenizer, schema, text) -> bool:
    """Whether a grammar takes a whole text."""
    matcher = compiler.compile("json", json.dumps(schema, ensure_ascii=False)).matcher()
    if not matcher.accept(tokenizer.encode(text, add_special_tokens=False)):
        return False
    return matcher.finished or tokenizer.eos_token_id in allowed(matcher, tokenizer.vocab_size)


def test_the_file_is_what_the_script_makes():
    spec = importlib.util.spec_from_file_location("make_schemas", Path(__file__).parents[2] / "schemas" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.FILE.read_text(encoding="utf-8") == make.written()
    assert len(SCHEMAS) == len({json.dumps(schema) for schema in SCHEMAS.values()}) == 200
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


def test_finished_answers_are_valid(compiler, tokenizer, walker):
    """The walk is free for 60 tokens and then takes the shortest way out: every cut of the text could go on."""
    refused, ends = refused_by(compiler), Counter()
    for number, (name, schema) in enumerate(SCHEMAS.items()):
        if name in refused:
            continue
        grammar, validator = (
            compiler.compile("json", json.dumps(schema)),
            Draft202012Validator(schema, format_checker=CHECKER),
        )
        for seed in (number, number + 1000):
            walk = walker.walk(grammar, seed, limit=800, forces=seed < 1000)
            ends[walk.is_finished] += 1
            text = tokenizer.decode(walk.token_ids)
            if walk.is_finished:
                error = jsonschema.exceptions.best_match(validator.iter_errors(json.loads(text)))
                assert error is None, f"{name}: {error.message} in {text}"
    assert ends[False] <= 0.03 * ends.total(), "texts without an end in sight"


def test_what_a_library_does_not_hold_is_refused_by_name(compiler):
    refused = {}
    for name, schema in SCHEMAS.items():
        try:
            compiler.compile("json", json.dumps(schema))
        except ValueError as error:
            refused[name] = str(error)
    expected = refused_by(compiler)
    assert refused.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in refused.items())
    assert all("llguidance may" in reason for reason in refused.values())


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string", "format": "date"}, '"2023-02-29"'),
        ({"type": "string", "format": "date-time"}, '"2023-02-30T10:00:00Z"'),
        ({"type": "string", "format": "time"}, '"25:00:00Z"'),
        ({"type": "string", "format": "ipv4"}, '"01.2.3.4"'),
        ({"type": "string", "format": "date", "pattern": "^2024"}, '"2023-01-30"'),
        ({"format": "date"}, '"x"'),
        ({"type": "string", "format": "no-such-format"}, '"x"'),
        ({"type": "object", "additionalProperties": INTEGER, "minProperties": 2}, '{"a": 1, "a": 2}'),
        ({**NAMED, "additionalProperties": INTEGER}, '{"\\u0061": 1}'),
        (NAMED, '{"\\u0061": 1}'),
        ({**NAMED, "patternProperties": {"^b\x01$": INTEGER}}, '{"\\u0061": 1}'),
        ({**NAMED, "required": ["a", "b"]}, '{"a": "x"}'),
        ({**NAMED, "patternProperties": {"^a": INTEGER}}, '{"a": "x"}'),
        ({"type": "object", "properties": {"a": INTEGER}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, '{"c": 1}'),
        ({"oneOf": [INTEGER, {"type": "number"}]}, "1"),
        ({"oneOf": [{"enum": ["a", "b"]}, {"const": "a"}]}, '"a"'),
        ({"oneOf": [NAMED, {"type": "object", "properties": {"b": INTEGER}}]}, "{}"),
        ({"allOf": [{"minimum": 3}, {"type": "integer", "maximum": 9}]}, "12"),
        ({"type": "number", "multipleOf": 0.5}, "1.25"),
        ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}, '"abcd"'),
        ({"type": "string", "pattern": '^[^a]$'}, '"""'),
        ({"type": "string", "pattern": "^a(?:\\.[0-9]{1,9})?$"}, '"a1"'),
        ({"enum": [1, 2], "type": "string"}, "1"),
        ({"enum": [1, 5, 9], "minimum": 4}, "1"),
        ({"minimum": 3}, "2"),
        ({"minimum": 3, "maxLength": 2}, '"abc"'),
        ({"required": ["a"]}, "{}"),
        ({"maxItems": 0}, "[1]"),
        ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": INTEGER}}, "3"),
        ({"anyOf": [INTEGER, {"type": "null"}], "minimum": 5}, "3"),
        ({"$defs": {"n": {"$anchor": "N", "type": "integer"}}, "$ref": "#N"}, '"x"'),
        ({"not": {"type": "string"}}, '"x"'),
        ({"type": "object", "propertyNames": {"maxLength": 1}, "additionalProperties": INTEGER}, '{"ab": 1}'),
        ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, "[1, 1]"),
        ({"type": "array", "items": INTEGER, "contains": {"const": 1}}, "[2]"),
        ({"type": "object", "if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}}, '{"a": 1}'),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
        ({"type": "object", "unevaluatedProperties": False}, '{"a": 1}'),
        ({"type": "string", "maxLength": 3}, '"\x08"'),
        (False, "1"),
    ],
)  # fmt: skip
def test_what_is_not_valid_is_barred_or_refused(compiler, tokenizer, schema, text):
    try:
        is_taken = takes(compiler, tokenizer, schema, text)
    except ValueError as refusal:
        is_taken = len(str(refusal)) < 10
    assert not is_taken


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (True, "[1, null]"),
        ({"type": "string", "format": "date"}, '"2024-02-29"'),
        ({"type": "string", "format": "date-time"}, '"2024-12-31T23:59:59.25+02:00"'),
        ({"type": "string", "format": "email"}, '"a.b+c@d-e.example"'),
        ({"type": "string", "maxLength": 3}, '"😀ß["'),
        ({"properties": {"\x01": INTEGER}, "additionalProperties": False}, '{"\\u0001": 3}'),
        ({"enum": ["\x01", "ü"]}, '"\\u0001"'),
        ({"oneOf": [{"const": "a"}, {"type": "integer"}]}, '"a"'),
        ({"type": "string", "pattern": "^(?:a|b)+$"}, '"abba"'),
        ({"enum": [1, 2.0], "type": "integer"}, "1"),
    ],
)
def test_what_is_valid_is_taken(compiler, tokenizer, schema, text):
    assert takes(compiler, tokenizer, schema, text)


@pytest.mark.parametrize("depth", [100, 5000, 100_000])
def test_schemas_nested_without_end_are_refused(compiler, depth):
    for source in ('{"items":' * depth + "{}" + "}" * depth, '{"anyOf":[' * depth + "{}" + "]}" * depth):
        with pytest.raises(ValueError, match=r"nested|recursion|deep"):
            compiler.compile("json", source)


@pytest.mark.parametrize("blank", [" ", "\n", "\t", "\r\n", " \n"])
def test_white_space_comes_to_an_end(compiler, tokenizer, blank):
    for schema in ({"type": "object"}, {"type": "array"}, SCHEMAS["nested-5"]):
        matcher = compiler.compile("json", json.dumps(schema)).matcher()
        ids, num_blank = tokenizer.encode(blank, add_special_tokens=False), 0
        while matcher.accept(ids[:1]) and num_blank < 200:
            num_blank += 1
        assert num_blank < 60
