"""Values followed as they come: where they end, and that what comes out is JSON."""

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed import cut

from llmd.text.parsers.scanners import MAX_DEPTH, BrokenValue, JsonScanner, PythonScanner, scan_whole
from llmd.text.parsers.schemas import ToolSchemas, to_json

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)
cuts = st.lists(st.integers(0, 1 << 20), max_size=6)


def scan(scanner, chunks):
    """The JSON text of a value that comes in pieces, and what is left of the text behind it."""
    rest, out = "", ""
    for index, chunk in enumerate(chunks):
        rest += chunk
        end = scanner.feed(rest, 0, len(rest), is_last=index == len(chunks) - 1)
        out += scanner.take()
        rest = rest[end:]
    return out, rest


@settings(max_examples=150, deadline=None)
@given(values, cuts, st.sampled_from([None, 1]), st.booleans())
def test_json_comes_out_as_it_went_in(value, positions, indent, is_ascii):
    text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
    out, rest = scan(JsonScanner(), cut(text + " }tail", positions))
    assert json.loads(out) == value
    assert rest.strip() == "}tail"


@settings(max_examples=150, deadline=None)
@given(values, cuts)
def test_python_literals_become_json(value, positions):
    out, rest = scan(PythonScanner(), cut(repr(value) + ")", positions))
    assert json.loads(out) == ast.literal_eval(repr(value))
    assert rest == ")"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='{}[],:"\\ntrue1.-eu0\n ', max_size=20), cuts)
def test_what_is_accepted_is_json_however_it_is_cut(text, positions):
    whole = scan_whole(JsonScanner(), text)
    if whole is not None:
        json.loads(whole)
    try:
        json.loads(text)
    except ValueError:
        pass
    else:
        assert whole is not None
    try:
        pieces = scan(JsonScanner(), cut(text, positions))
    except BrokenValue:
        assert whole is None
    else:
        assert whole is None or pieces[0].strip() == whole.strip()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ('{"a": "line\nline\ttab"}', {"a": "line\nline\ttab"}),
        (r'{"a": "\d+ \x \u12"}', {"a": r"\d+ \x \u12"}),
        (r"""{"a": "it\'s"}""", {"a": "it's"}),
        ('{"a": True, "b": None, "c": False}', {"a": True, "b": None, "c": False}),
        ('{"a": [1, 2, ], }', {"a": [1, 2]}),
        ('{"a" :1 , "b":-0.5e+3 }', {"a": 1, "b": -500.0}),
    ],
)
def test_what_models_get_wrong_is_put_right(text, meant):
    assert json.loads(scan_whole(JsonScanner(), text)) == meant


@pytest.mark.parametrize(
    "text",
    ["", "{", "{a: 1}", "{'a': 1}", '{"a" 1}', '{"a": 01}', '{"a": nan}', "[1 2]", "{,}", "[,]", '{"a": 1]',
     "[" * 201 + "]" * 201, "1" * 1001, '{"a": 1,, }', "{1: 2}", "<tool_call>"],
)  # fmt: skip
def test_what_is_no_json(text):
    assert scan_whole(JsonScanner(), text) is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("'it''s'", None),
        ("'''a'b\"c\n'''", "a'b\"c\n"),
        ('""', ""),
        ("''", ""),
        (r"'\x41\u00e9\U0001F600\n\'\q\0'", "A\u00e9\U0001f600\n'\\q\0"),
        ("(1, 'a', (2,),)", [1, "a", [2]]),
        ("0x1F", 31),
        ("1_000", 1000),
        ("+.5", 0.5),
        ("true", True),
        ("inf", None),
        ("{1, 2}", None),
        ("f(x)", None),
        ("a", None),
        ("'open", None),
    ],
)
def test_python_forms(text, meant):
    found = scan_whole(PythonScanner(), text)
    assert found is None if meant is None else json.loads(found) == meant


def test_depth_is_bounded():
    assert scan_whole(JsonScanner(), "[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


@pytest.mark.parametrize(
    ("text", "types", "meant"),
    [
        ("3", {"integer"}, 3),
        (" 3\n", {"integer"}, 3),
        ("3.0", {"integer"}, 3),
        ("3.5", {"integer"}, "3.5"),
        ("3.5", {"number"}, 3.5),
        ("three", {"integer"}, "three"),
        ("True", {"boolean"}, True),
        ("FALSE", {"boolean"}, False),
        ("null", {"number", "null"}, None),
        ("null", {"string"}, "null"),
        ("5", {"string", "integer"}, 5),
        ('{"a": 1}', {"object"}, {"a": 1}),
        ("{'a': 1}", {"object"}, {"a": 1}),
        ('["a"', {"array"}, '["a"'),
        ('{"a": 1}', {"array"}, '{"a": 1}'),
        ("5", set(), 5),
        ("Paris", set(), "Paris"),
        ('"Paris"', set(), '"Paris"'),
        ("", {"integer"}, ""),
        ("1e999", {"integer"}, "1e999"),
    ],
)
def test_plain_text_takes_the_type_of_the_schema(text, types, meant):
    assert json.loads(to_json(text, frozenset(types))) == meant


def test_types_in_schemas():
    properties = {
        "plain": {"type": "string"},
        "list": {"type": ["string", "null"]},
        "any": {"anyOf": [{"type": "integer"}, {"oneOf": [{"type": "null"}]}]},
        "open": {"anyOf": [{"type": "integer"}, {}]},
        "choice": {"enum": ["a", "b"]},
        "mixed": {"enum": ["a", 1]},
        "true": True,
    }
    schemas = ToolSchemas([{"name": "f", "input_schema": {"properties": properties}}, {"function": {"name": "g"}}, {}, "x"])
    found = {key: set(schemas.types("f", key)) for key in [*properties, "missing"]}
    assert found == {
        "plain": {"string"},
        "list": {"string", "null"},
        "any": {"integer", "null"},
        "open": set(),
        "choice": {"string"},
        "mixed": set(),
        "true": set(),
        "missing": set(),
    }
    assert schemas.types("g", "a") == schemas.types("h", "a") == frozenset()
    assert [schemas.knows(name) for name in ("f", "g", "h")] == [True, True, False]
    assert ToolSchemas(None).knows("anything")
    assert not ToolSchemas([]).knows("anything")
