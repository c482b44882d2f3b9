"""The JSON schemas that xgrammar holds to the letter: what it would quietly take more loosely is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from llmd.api.v1 import STRING_FORMATS, JsonSchema, change_schemas, read_json_schema, schemas_within
from llmd_plugins.grammars.json_schemas import check_counts, exact_formats

_TYPED: Mapping[str, frozenset[str]] = {
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset(
        {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"}
    ),
}
_ANY_TYPE = frozenset({key for keys in _TYPED.values() for key in keys})
_WHOLE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # each says all there is to say
_NEVER = (
    *("not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
    *("additionalItems", "$dynamicRef", "$recursiveRef"),
)
_IPV4_PART = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = f"^{_IPV4_PART}(?:\\.{_IPV4_PART}){{3}}$"
_FORMATS = ("uuid", "ipv6", "hostname", "duration", "uri")  # besides those that are written as patterns
# What could match a quote, a backslash or a control character, which xgrammar would write as they are
_UNSAFE = re.compile(r'(?<!\\)\.(?![^\[]*\])|\[\^|\\[SDWsBbnrtfvxu0pPk]|"|\\\\|\(\?[^:]|[\x00-\x1f]')
_COUNTED = re.compile(r"\([^()]*\{[0-9,]+\}[^()]*\)[?*+{]")  # xgrammar 0.2 forgets what stands before the count
_GROUP = re.compile(r"(?<!\\)\(\?:")
_CHARACTER = "[ !#-\\[\\]-~\u00a1-\ud7ff\ue000-\U0010ffff]"  # of a string, written as itself
_TYPES = {str: "string", bool: "boolean", type(None): "null", int: "number", float: "number", dict: "object", list: "array"}


def held_schema(source: str) -> str:
    """The schema as xgrammar is to have it: no looser than the one given. Raises ValueError for what it would not hold."""
    schema = read_json_schema(source)
    for part in schemas_within(schema):
        check_counts(part)
        _check(part)
    return json.dumps(change_schemas(change_schemas(schema, _exact), _narrowed), ensure_ascii=False)


def _refuse(what: str) -> ValueError:
    return ValueError(f"xgrammar does not hold {what}; llguidance may (models.structured_outputs_backend)")


def _check(schema: JsonSchema) -> None:
    for key in _NEVER:
        if key in schema:
            raise _refuse(f"{key!r}")
    whole = [key for key in _WHOLE if key in schema]
    beside = [key for key in schema if key in _ANY_TYPE]
    if len(whole) > 1 or (whole and beside):
        raise _refuse(" beside ".join(repr(key) for key in (whole + beside)[:2]))
    for key in whole:
        _check_whole(schema, key)
    if "type" in schema and not whole:
        return
    if whole and "type" in schema and whole[0] not in ("const", "enum"):
        raise _refuse(f"'type' beside {whole[0]!r}")


def _check_whole(schema: JsonSchema, key: str) -> None:
    value = schema[key]
    if key == "$ref" and (not isinstance(value, str) or not re.fullmatch(r"#(/[^%~]*)?", value)):
        raise _refuse(f"the $ref {value!r}"[:100])
    if key == "allOf" and isinstance(value, list) and len(value) > 1:
        raise _refuse("'allOf' of several schemas")
    if key == "oneOf" and isinstance(value, list) and not all(_exclude(*pair) for pair in combinations(value, 2)):
        raise _refuse("'oneOf' whose schemas do not exclude each other by a type or a constant")
    if key in ("const", "enum") and "type" in schema:
        values = value if key == "enum" and isinstance(value, list) else [value]
        if not all(_is_of(entry, schema["type"]) for entry in values):
            raise _refuse(f"{key!r} with values that are not of the type")


def _is_of(value: Any, types: Any) -> bool:
    kind = _TYPES.get(type(value), "")
    names = types if isinstance(types, list) else [types]
    return kind in names or (kind == "number" and "integer" in names and float(value).is_integer())


def _types(schema: Any) -> frozenset[str]:
    """The types that a schema's values may have, integers being numbers; empty when it does not say."""
    if not isinstance(schema, dict):
        return frozenset()
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return frozenset("number" if name == "integer" else str(name) for name in names)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return frozenset(_TYPES.get(type(value), "") for value in values) if isinstance(values, list) else frozenset()


def _exclude(first: Any, second: Any) -> bool:
    """Whether no value fits both."""
    types = _types(first), _types(second)
    if all(types) and not types[0] & types[1]:
        return True
    return any(not values & _constants(second).get(name, values) for name, values in _constants(first).items())


def _constants(schema: Any) -> dict[str, frozenset[str]]:
    """Required properties that have one of a few values, as JSON."""
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        return {}
    found = {}
    for name in schema.get("required") or ():
        entry = schema["properties"].get(name)
        if isinstance(entry, dict) and ("const" in entry or isinstance(entry.get("enum"), list)):
            values = [entry["const"]] if "const" in entry else entry["enum"]
            found[name] = frozenset(json.dumps(value, sort_keys=True) for value in values)
    return found


def _exact(schema: JsonSchema) -> JsonSchema:
    if schema.get("format") == "ipv4" and "pattern" not in schema:
        schema = {**{key: value for key, value in schema.items() if key != "format"}, "pattern": _IPV4}
    schema = exact_formats(schema)
    if "allOf" in schema and "pattern" in schema:
        raise _refuse("'format' beside 'pattern'")
    return schema


def _narrowed(schema: JsonSchema) -> JsonSchema:
    """With a type, without properties that are not named, lengths as patterns: fewer answers, all of them valid."""
    groups = [name for name, keys in _TYPED.items() if keys & schema.keys()]
    if "type" not in schema and groups:
        if len(groups) > 1:
            raise _refuse("a schema for several types without 'type'")
        schema = {"type": groups[0], **schema}
    if "object" in groups:
        schema = _closed(schema)
    return _string(schema) if "string" in groups else schema


def _closed(schema: JsonSchema) -> JsonSchema:
    """A key that is named must not come again in another spelling, as one that is not."""
    named, rest = schema.get("properties") or {}, schema.get("additionalProperties", True)
    if not isinstance(named, dict) or set(schema.get("required") or ()) - named.keys():
        raise _refuse("'required' of properties that are not described")
    if "patternProperties" in schema and (named or rest is not False):
        raise _refuse("'patternProperties' beside other properties")
    if not named or rest is False:
        return schema
    if rest not in (True, {}):
        raise _refuse("'additionalProperties' beside 'properties'")
    return {**schema, "additionalProperties": False}


def _string(schema: JsonSchema) -> JsonSchema:
    given = [key for key in ("pattern", "format", "minLength", "maxLength") if key in schema]
    if given[0] in ("pattern", "format") and len(given) > 1:
        raise _refuse(f"{given[0]!r} beside {given[1]!r}")
    if given[0] == "format" and schema["format"] not in _FORMATS:
        raise _refuse(f"the format {schema['format']!r}"[:100])
    if given[0] == "pattern" and _UNSAFE.search(str(schema["pattern"])):
        raise _refuse("a pattern with '.', negated classes, white space, escapes or look-around")
    if given[0] == "format":
        return schema
    if given[0] == "pattern":
        if _COUNTED.search(str(schema["pattern"])) and schema["pattern"] not in STRING_FORMATS.values():
            raise _refuse("a pattern with a count in a group that is optional or repeated")
        return {**schema, "pattern": _GROUP.sub("(", str(schema["pattern"]))}
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    rest = {key: value for key, value in schema.items() if key not in given}
    return {**rest, "pattern": f"^{_CHARACTER}{{{least},{most}}}$"}
