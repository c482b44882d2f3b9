"""What the tools of a request say of their arguments, for formats that write all values as plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from llmd.text.parsers.scanners import JsonScanner, PythonScanner, scan_whole

STRING = frozenset({"string"})
_TYPES = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}
_BOOLEANS = ("true", "false")


class ToolSchemas:
    """The functions that may be called; without tools any may, with whatever arguments."""

    def __init__(self, tools: Sequence[Any] | None) -> None:
        functions = [_function(tool) for tool in tools or () if isinstance(tool, Mapping)]
        self._parameters = {
            function["name"]: _parameters(function) for function in functions if isinstance(function.get("name"), str)
        }
        self.strict = frozenset(function.get("name") for function in functions if function.get("strict"))
        self._is_any = tools is None

    def knows(self, name: str) -> bool:
        """Whether there is such a function."""
        return self._is_any or name in self._parameters

    @property
    def names(self) -> tuple[str, ...]:
        """The functions, in the request's order."""
        return tuple(self._parameters)

    def parameters(self, name: str) -> Mapping[str, Any]:
        """The schema of a function's arguments, empty when it has none."""
        return self._parameters[name]

    def types(self, name: str, key: str) -> frozenset[str]:
        """The JSON types an argument may have; none when nothing is said."""
        root = self._parameters.get(name) or {}
        schema = resolved(root, root)
        properties = schema.get("properties")
        return types_of(properties.get(key), root) if isinstance(properties, Mapping) else frozenset()


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part with the name, of OpenAI's nested form or a flat one."""
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = function.get("parameters", function.get("input_schema"))
    return schema if isinstance(schema, Mapping) else {}


def resolved(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that a reference into $defs or definitions means; one that means nothing here is left as it is."""
    for _ in range(8):
        found = _target(schema, root) if isinstance(schema, Mapping) and "$ref" in schema else None
        if found is None or schema.keys() - _BESIDE_REF:
            break
        schema = found
    return dict(schema) if isinstance(schema, Mapping) else {}


_BESIDE_REF = frozenset(["$ref", "$defs", "definitions", "title", "description", "default", "examples"])


def _target(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    where, _, name = str(schema["$ref"]).removeprefix("#/").partition("/")
    named = root.get(where) if where in ("$defs", "definitions") else None
    target = named.get(name) if isinstance(named, Mapping) else None
    return target if isinstance(target, Mapping) else None


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema's values may have; none when it does not say. References are into `root`."""
    if not isinstance(schema, Mapping) or depth > 8:
        return frozenset()
    schema = resolved(schema, root)
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset({named})
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            kinds = [types_of(option, root, depth + 1) for option in schema[key]]
            return frozenset().union(*kinds) if all(kinds) else frozenset()
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return STRING
    return frozenset()


def to_json(text: str, types: frozenset[str]) -> str:
    """An argument written as plain text, as JSON text of one of the types; a string when nothing else fits."""
    bare = text.strip()
    candidates = [scan_whole(JsonScanner(), bare), scan_whole(PythonScanner(), bare)]
    if "boolean" in types and bare.lower() in _BOOLEANS:
        candidates.append(bare.lower())
    for candidate in candidates:
        fitting = _fitting(candidate, types)
        if fitting is not None:
            return fitting
    return json.dumps(text, ensure_ascii=False)


def _fitting(candidate: str | None, types: frozenset[str]) -> str | None:
    """The candidate if its type is among those wanted, or anything when nothing is said. Quotes are part of a string."""
    kind = _TYPES.get(candidate[0], "number") if candidate else "string"
    if candidate is None or kind == "string":
        return None
    if kind != "number" or "number" in types or not types:
        return candidate if not types or kind in types else None
    return _integer(candidate) if "integer" in types else None


def _integer(number: str) -> str | None:
    """The number without a fraction, if it has none."""
    if number.lstrip("-").isdigit():
        return number
    with suppress(ValueError, OverflowError):
        if float(number).is_integer():
            return str(int(float(number)))
    return None
