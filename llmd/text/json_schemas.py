"""JSON schemas: read, walked through, changed; and the formats of strings as regular expressions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_DEPTH = 64  # of schemas within schemas

# where JSON Schema (draft 2020-12, and 4 to 7) keeps schemas within schemas
_ONE = (
    *("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedProperties", "unevaluatedItems"),
)
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"  # two digits, a multiple of four, not 00
_LEAP_YEAR = f"(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DAY = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_FRACTION = "(?:\\.[0-9]" + "[0-9]?" * 5 + ")?"  # without braces, which xgrammar takes wrongly here
_TIME = f"{_HOUR}:[0-5][0-9]{_FRACTION}(?:Z|[+-]{_HOUR})"
_WORD = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,15}"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,20}[A-Za-z0-9])?"
# RFC 3339 without leap seconds (which few readers take), with the days that a month has; RFC 5321 without quotes
STRING_FORMATS: Mapping[str, str] = {
    "date": f"^{_DAY}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DAY}T{_TIME}$",
    "email": f"^{_WORD}(?:\\.{_WORD}){{0,3}}@{_LABEL}(?:\\.{_LABEL}){{1,4}}$",
}

JsonSchema = dict[str, Any]


def read_json_schema(source: str) -> JsonSchema:
    """The schema of a JSON text. Raises ValueError for what is none, or allows nothing."""
    try:
        schema = json.loads(source)
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object")
    return schema


def schemas_within(schema: Any, depth: int = 0) -> Iterator[JsonSchema]:
    """The schema and all schemas in it. Raises ValueError for one nested too deeply."""
    if not isinstance(schema, dict):
        return
    if depth > MAX_DEPTH:
        raise ValueError(f"the schema is nested more than {MAX_DEPTH} deep")
    yield schema
    for child in _children(schema):
        yield from schemas_within(child, depth + 1)


def _children(schema: JsonSchema) -> Iterator[Any]:
    for key in _ONE:
        yield schema.get(key)
    for key in _MANY:
        yield from schema[key] if isinstance(schema.get(key), list) else ()
    for key in _NAMED:
        yield from schema[key].values() if isinstance(schema.get(key), dict) else ()


def change_schemas(schema: Any, change: Callable[[JsonSchema], JsonSchema]) -> Any:
    """The schema with every schema in it replaced, the inner ones first; `schemas_within` has seen how deep it is."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in _ONE:
        if key in made:
            made[key] = change_schemas(made[key], change)
    for key in _MANY:
        if isinstance(made.get(key), list):
            made[key] = [change_schemas(part, change) for part in made[key]]
    for key in _NAMED:
        if isinstance(made.get(key), dict):
            made[key] = {name: change_schemas(part, change) for name, part in made[key].items()}
    return change(made)


_MERGING = frozenset({"allOf", "not", "if", "then", "else", "dependentSchemas"})  # what speaks of the same object twice
_BRANCHING = frozenset({"anyOf", "oneOf", "$ref"})
_OPEN = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"})


def close_objects(schema: JsonSchema) -> JsonSchema:
    """The schema with no properties but the named ones in objects that say nothing of others.

    Few who leave `additionalProperties` out mean a model to write keys of its own, and a small one never stops. Left
    open is what another part of the schema may add properties to.
    """
    parts = list(schemas_within(schema))
    merges = any(part.keys() & _MERGING or ("properties" in part and part.keys() & _BRANCHING) for part in parts)
    return schema if merges else change_schemas(schema, _close)


def _close(schema: JsonSchema) -> JsonSchema:
    properties, required = schema.get("properties"), schema.get("required") or ()
    if not isinstance(properties, dict) or not properties or schema.keys() & _OPEN:
        return schema
    return schema if set(required) - properties.keys() else {**schema, "additionalProperties": False}
