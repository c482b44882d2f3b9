"""Writes schemas.json: 200 JSON schemas, twenty families of ten that grow harder. `python tests/schemas/make.py`

Nothing is drawn by chance: the same script makes the same file, which a test compares. Strings are short and lists are
bounded wherever a family is not about the opposite, so that a model that says anything comes to an end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Schema = dict[str, Any]
LEVELS = range(1, 11)
FILE = Path(__file__).with_name("schemas.json")
WORDS = ("name", "age", "city", "size", "kind", "rate", "tags", "note", "unit", "code", "path", "flag")


def text(longest: int = 6) -> Schema:
    """A short string."""
    return {"type": "string", "maxLength": longest}


def closed(properties: Schema, required: list[str] | None = None) -> Schema:
    """An object with these properties and no others; all of them required unless told."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def flat(level: int) -> Schema:
    """Objects of more and more scalars."""
    kinds = ({"type": "integer"}, text(), {"type": "boolean"}, {"type": "null"}, {"type": "number"})
    return closed({WORDS[index]: kinds[index % len(kinds)] for index in range(level)})


def optional(level: int) -> Schema:
    """Required and optional properties mixed, also with the required ones behind."""
    names = WORDS[: level + 2]
    return closed({name: {"type": "integer", "minimum": 0} for name in names}, [*names[level % 3 :: 3]][::-1])


def nested(level: int) -> Schema:
    """Objects in objects."""
    schema: Schema = {"type": "boolean"}
    for depth in range(level):
        schema = closed({f"level{depth}": schema, **({"also": text(3)} if depth % 2 else {})})
    return schema


def arrays(level: int) -> Schema:
    """Lists with bounds on their length, and lists of lists."""
    item: Schema = [{"type": "integer"}, text(3), {"type": "boolean"}][level % 3]
    schema: Schema = {"type": "array", "items": item, "minItems": level // 2, "maxItems": level}
    return schema if level < 6 else {"type": "array", "items": schema, "minItems": 1, "maxItems": 2}


def tuples(level: int) -> Schema:
    """prefixItems, closed, open and with a tail of another type."""
    kinds: tuple[Schema, ...] = ({"type": "integer"}, {"type": "boolean"}, text(4), {"const": "x"}, {"type": "null"})
    items = [kinds[index % len(kinds)] for index in range(level)]
    tail: Any = [False, {"type": "null"}, text(2)][level % 3]
    schema: Schema = {"type": "array", "prefixItems": items, "items": tail, "minItems": max(1, level - level % 4)}
    return schema if tail is False else {**schema, "maxItems": level + 2}


def integers(level: int) -> Schema:
    """Integers with bounds."""
    bounds: list[Schema] = [
        {"minimum": 0}, {"maximum": 0}, {"minimum": 1, "maximum": 12}, {"exclusiveMinimum": -4, "exclusiveMaximum": 4},
        {"minimum": -17, "exclusiveMaximum": 1000}, {"minimum": 99, "maximum": 1001}, {"exclusiveMinimum": 7, "maximum": 8},
        {"minimum": -(10**9), "maximum": -(10**6)}, {"minimum": 10**12, "maximum": 10**15}, {"minimum": 5, "maximum": 5},
    ]  # fmt: skip
    return closed({"value": {"type": "integer", **bounds[level - 1]}, "list": {"type": "array", "maxItems": 3,
                   "items": {"type": "integer", **bounds[-level]}}})  # fmt: skip


def numbers(level: int) -> Schema:
    """Numbers with bounds."""
    bounds: list[Schema] = [
        {"minimum": 0}, {"maximum": 1}, {"minimum": 0, "maximum": 1}, {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"minimum": -0.5, "maximum": 0.25}, {"minimum": 1.25, "exclusiveMaximum": 1.75}, {"minimum": -273.15},
        {"exclusiveMinimum": -0.001, "maximum": 0.001}, {"minimum": 0.1, "maximum": 99.99}, {"minimum": 3.5, "maximum": 1e6},
    ]  # fmt: skip
    return closed({"value": {"type": "number", **bounds[level - 1]}})


def multiples(level: int) -> Schema:
    """multipleOf, alone and within bounds."""
    kinds: list[Schema] = [
        {"type": "integer", "multipleOf": 2}, {"type": "integer", "multipleOf": 10},
        {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100}, {"type": "integer", "multipleOf": 3},
        {"type": "integer", "multipleOf": 25, "exclusiveMinimum": 0}, {"type": "number", "multipleOf": 5},
        {"type": "integer", "multipleOf": 11, "maximum": -1}, {"type": "number", "multipleOf": 0.5},
        {"type": "integer", "multipleOf": 12, "minimum": 100, "exclusiveMaximum": 1200},
        {"type": "integer", "multipleOf": 60, "minimum": 0, "maximum": 3600},
    ]  # fmt: skip
    return closed({"value": kinds[level - 1]})


def lengths(level: int) -> Schema:
    """Strings with bounds on their length, counted in characters."""
    return closed({"value": {"type": "string", "minLength": level // 2, "maxLength": level}, "empty": text(0)})


PATTERNS = (
    "^[a-z]{1,8}$", "^[A-Z][a-z]+$", r"^\d{3}-\d{4}$", "^(red|green|blue)$", r"^#[0-9a-fA-F]{6}$",
    r"^[^\s@]{1,5}@[a-z]+\.de$", r"^v\d+\.\d+(\.\d+)?$", "^[äöüß]{2,4}$", r"^\(\d{2,3}\) \d+$",
    r"^(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d)?$",
)  # fmt: skip


def patterns(level: int) -> Schema:
    """Regular expressions, the later ones with a bound on the length or without anchors."""
    schema: Schema = {"type": "string", "pattern": PATTERNS[level - 1]}
    if level == 2:
        schema = {**schema, "minLength": 3, "maxLength": 7}
    loose = {"type": "string", "pattern": "b[0-9]c"} if level % 5 == 0 else text(3)
    return closed({"value": schema, "other": loose})


def formats(level: int) -> Schema:
    """Formats of strings."""
    names = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration", "uri")
    first = {"type": "string", "format": names[level - 1]}
    return closed({"value": first, "list": {"type": "array", "items": {"type": "string", "format": names[-level]},
                   "maxItems": 1}})  # fmt: skip


def enums(level: int) -> Schema:
    """Enumerations, from two words to hundreds, of all types."""
    mixed: list[Any] = [1, "1", None, True, 2.5, [1, "a"], {"a": {"b": []}}, 'ü\n"', -3, ""]
    many = [f"value {index}" for index in range(4**level // 40 + 2)][:800]
    return closed({"mixed": {"enum": mixed[:level]}, "many": {"type": "string", "enum": many}})


def constants(level: int) -> Schema:
    """const of all types."""
    values: list[Any] = [1, "a", None, False, [], {}, -2.5, '"\\\n\u0001é', {"a": [1, {"b": None}]}, [[], [[]], {"": ""}]]
    return closed({"is": {"const": values[level - 1]}, "or": {"enum": [values[level - 1], values[-level]]}})


def unions(level: int) -> Schema:
    """anyOf of more and more."""
    options: list[Schema] = [
        {"type": "integer"}, {"type": "null"}, text(4), closed({"a": {"type": "boolean"}}),
        {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, closed({"b": {"type": "integer"}, "c": text(2)}),
        {"const": "fixed"}, {"type": ["boolean", "null"]}, {"anyOf": [{"enum": [1, 2]}, {"type": "boolean"}]},
        {"type": "array", "prefixItems": [text(1), {"type": "null"}], "items": False, "minItems": 2},
    ]  # fmt: skip
    return closed({"value": {"anyOf": options[: level + 1]}, "list": {"type": "array", "maxItems": 2,
                   "items": {"anyOf": options[-level:]}}})  # fmt: skip


def exclusive(level: int) -> Schema:
    """oneOf whose options exclude each other: by type, by length, by a property that says which it is."""
    if level < 4:
        return {"oneOf": [{"type": "integer"}, text(4), {"type": "null"}, {"type": "boolean"}][: level + 1]}
    options = [closed({"kind": {"const": WORDS[index]}, f"{WORDS[index]}s": {"type": "integer"}}) for index in range(level)]
    return closed({"items": {"type": "array", "items": {"oneOf": options}, "minItems": 1, "maxItems": 2}})


def together(level: int) -> Schema:
    """allOf: bounds, properties and references put together."""
    if level < 4:
        parts: list[Schema] = [{"type": "integer"}, {"minimum": 3}, {"maximum": 99}, {"exclusiveMaximum": 50}]
        return {"allOf": parts[: level + 1]}
    parts = [
        {"type": "object", "properties": {name: {"type": "integer"} if index % 2 else text(3)}, "required": [name]}
        for index, name in enumerate(WORDS[: level - 2])
    ]
    if level % 2:
        return {"allOf": [*parts, {"properties": {name: {} for name in WORDS[: level - 2]}, "additionalProperties": False}]}
    return {"$defs": {"base": parts[0]}, "allOf": [{"$ref": "#/$defs/base"}, *parts[1:]]}


def references(level: int) -> Schema:
    """$ref into $defs, definitions and properties, in chains."""
    if level == 1:
        return {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}},
                "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    key = "definitions" if level % 2 else "$defs"
    chain: Schema = {"d0": closed({"x": {"type": "integer"}, "y": text(3)})}
    for index in range(1, level):
        before = {"$ref": f"#/{key}/d{index - 1}"}
        chain[f"d{index}"] = before if index % 3 == 0 else closed({"in": before, **({"v": text(2)} if index % 2 else {})})
    top = {"top": {"$ref": f"#/{key}/d{level - 1}"}}
    odd = {"odd": {"$ref": f"#/{key}/a%20b~1c~0"}} if level > 7 else {}
    return {key: {**chain, "a b/c~": text(2)}, **closed({**top, **odd})}


def recursive(level: int) -> Schema:
    """Trees, linked lists, expressions, and definitions that refer to each other."""
    node = {"$ref": "#/$defs/node"}
    children: Schema = {"type": "array", "items": node, "maxItems": level % 3 + 1}
    shapes: list[Schema] = [
        {"node": closed({"value": {"type": "integer"}, "children": children})},
        {"node": {"anyOf": [{"type": "null"}, closed({"value": text(2), "next": node})]}},
        {"node": {"anyOf": [{"type": "integer"}, closed({"op": {"enum": ["+", "*"]}, "left": node, "right": node})]}},
        {"node": closed({"name": text(3), "left": node, "right": node}, ["name"])},
        {"node": closed({"pair": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/other"}]}}),
         "other": closed({"node": node, "count": {"type": "integer", "minimum": 0}})},
    ]  # fmt: skip
    shape = shapes[(level - 1) % 5]
    return {"$defs": shape, **node} if level <= 5 else {"$defs": shape, **closed({"root": node, "level": {"const": level}})}


KEYS = (
    "größe",
    "日本語",
    'say "hi"',
    "back\\slash",
    "new\nline",
    "tab\t",
    "",
    " ",
    "😀",
    "$ref",
    "a.b",
    "\u0001",
    "null",
    "é́",
)


def strange_keys(level: int) -> Schema:
    """Keys that must be escaped, that are not ASCII, that look like something else."""
    names = KEYS[level % 4 : level % 4 + level]
    return closed({name: {"type": "integer", "minimum": 0} if index % 2 else {"const": name}
                   for index, name in enumerate(names)}, list(names[::2]))  # fmt: skip


def open_objects(level: int) -> Schema:
    """Objects whose keys are not all named: additionalProperties, patternProperties, bounds on their number."""
    number: Schema = {"type": "integer", "minimum": 0, "maximum": 99}
    shapes: list[Schema] = [
        {"type": "object", "properties": {}, "additionalProperties": False}, {"type": "object", "maxProperties": 0},
        {"type": "object", "additionalProperties": number}, {"type": "object", "additionalProperties": {"type": "null"}},
        {"type": "object", "properties": {"a": text(2)}, "required": ["a"], "additionalProperties": number},
        {"type": "object", "patternProperties": {"^x_[a-z]{1,3}$": number}, "additionalProperties": False},
        {"type": "object", "additionalProperties": number, "minProperties": 1, "maxProperties": 2},
        {"type": "object", "properties": {"a": number}, "patternProperties": {"^b[0-9]$": text(2)}, "required": ["a"],
         "additionalProperties": {"type": "boolean"}},
        {"type": "object"}, {},
    ]  # fmt: skip
    return shapes[level - 1]


def everything(level: int) -> Schema:
    """What applications ask for: orders, forms, plans of agents, with all of the above at once."""
    item = closed({"sku": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}, "count": {"type": "integer", "minimum": 1,
                   "maximum": 20}, "note": {"type": ["string", "null"], "maxLength": 5}}, ["sku", "count"])  # fmt: skip
    person = closed({"name": {"type": "string", "minLength": 1, "maxLength": 8}, "boss": {"anyOf": [{"type": "null"},
                     {"$ref": "#/$defs/person"}]}})  # fmt: skip
    step = {"oneOf": [closed({"do": {"const": "say"}, "text": text(5)}), closed({"do": {"const": "wait"},
            "seconds": {"type": "number", "minimum": 0, "maximum": 60}})]}  # fmt: skip
    parts: Schema = {
        "id": {"type": "string", "format": "uuid"}, "day": {"type": "string", "format": "date"},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1, "maxItems": 2},
        "who": {"$ref": "#/$defs/person"}, "plan": {"type": "array", "items": {"$ref": "#/$defs/step"}, "maxItems": 2},
        "state": {"enum": ["open", "paid", None]}, "total": {"type": "number", "minimum": 0, "exclusiveMaximum": 10**4},
        "place": {"type": "array", "prefixItems": [{"type": "number", "minimum": -90, "maximum": 90}] * 2, "items": False,
                  "minItems": 2},
        "labels": {"type": "object", "additionalProperties": text(2), "maxProperties": 2}, "größe": {"enum": ["S", "M"]},
    }  # fmt: skip
    chosen = dict(list(parts.items())[: level + 0])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"Order {level}", "description": "An order",
            "$defs": {"item": item, "person": person, "step": step},
            **closed(chosen, [name for index, name in enumerate(chosen) if index % 3 != 2])}  # fmt: skip


FAMILIES: tuple[Callable[[int], Schema], ...] = (
    flat, optional, nested, arrays, tuples, integers, numbers, multiples, lengths, patterns, formats, enums, constants,
    unions, exclusive, together, references, recursive, strange_keys, open_objects,
)  # fmt: skip


def schemas() -> Iterator[tuple[str, Schema]]:
    """Name and schema of each, the harder ones of a family behind the easier. The last of each is an application's."""
    for number, family in enumerate(FAMILIES):
        for level in LEVELS:
            mixes = level == 10 and number % 2 == 1
            yield f"{family.__name__}-{level}", everything((number + 1) // 2) if mixes else family(level)


def written() -> str:
    """The file, a schema a line."""
    lines = (f"{json.dumps(name)}: {json.dumps(schema, ensure_ascii=False)}" for name, schema in schemas())
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
