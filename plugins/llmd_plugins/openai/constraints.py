"""What the output must follow, by OpenAI's name (response_format) and vLLM's: structured_outputs and the older guided_…"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from llmd.api.v1 import InvalidParams, InvalidRequest, StructuredOutputsParams, shown
from llmd_plugins.openai.messages import object_at, string_at, wrong

if TYPE_CHECKING:
    from llmd_plugins.openai.protocol import Generation

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
# vLLM's other keys and the values of theirs that change nothing here: white space is bounded, nothing falls back
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "disable_fallback": (None, True, False),
    "disable_any_whitespace": (None, False),
    "disable_additional_properties": (None, False),
    "whitespace_pattern": (None,),
    "backend": (None, "auto"),
}
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")

_TEXT = {"type": "string"}
_SCHEMA = {"type": "object"}
RESPONSE_FORMAT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "json_object"]}}},
        {
            "type": "object",
            "required": ["type", "json_schema"],
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "required": ["name", "schema"],
                    "properties": {
                        "name": _TEXT,
                        "description": _TEXT,
                        "schema": _SCHEMA,
                        "strict": {"type": ["boolean", "null"]},
                    },
                },
            },
        },
        {"type": "object", "required": ["type"], "properties": {"type": {"const": "structural_tag"}}},
    ]
}
STRUCTURED_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "json": {"anyOf": [_TEXT, _SCHEMA]},
        "regex": _TEXT,
        "choice": {"type": "array", "items": _TEXT},
        "grammar": _TEXT,
        "json_object": {"const": True},
        "structural_tag": _TEXT,
    },
}


def check_response_format(value: Any) -> dict[str, Any] | None:
    """The constraint as one of StructuredOutputsParams's fields; None for text."""
    if value is None:
        return None
    given = object_at("response_format", value)
    kind = given.get("type")
    if kind not in _FORMATS:
        raise wrong("response_format.type", f"one of {', '.join(_FORMATS)}", kind)
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        return {"json": _json_schema(given)}
    if kind == "structural_tag":
        return {"structural_tag": orjson.dumps(given).decode()}
    return None


def _json_schema(given: dict[str, Any]) -> dict[str, Any]:
    wrapped = object_at("response_format.json_schema", given.get("json_schema"))
    if wrapped.get("name") is not None:
        string_at("response_format.json_schema.name", wrapped["name"])
    if not isinstance(wrapped.get("strict"), bool | None):
        raise wrong("response_format.json_schema.strict", "true or false", wrapped["strict"])
    return object_at("response_format.json_schema.schema", wrapped.get("schema"))


def check_structured(value: Any) -> dict[str, Any] | None:
    """`structured_outputs` without the keys that change nothing."""
    if value is None:
        return None
    given = object_at("structured_outputs", value)
    for name, entry in given.items():
        path = f"structured_outputs.{name[:64]}"
        if name not in _KINDS and name not in _NEUTRAL:
            raise InvalidRequest(f"unknown field {path}; known: {', '.join(_KINDS)}", param=path, code="unknown_parameter")
        if name in _NEUTRAL and entry not in _NEUTRAL[name]:
            message = f"{path} is not served by this server, got {shown(entry)}"
            raise InvalidRequest(message, param=path, code="unsupported_parameter")
    kinds = {name: given[name] for name in _KINDS if given.get(name) is not None}
    if len(kinds) != 1:
        raise wrong("structured_outputs", f"an object with exactly one of {', '.join(_KINDS)}", list(kinds))
    if "structural_tag" in kinds and isinstance(kinds["structural_tag"], dict):
        kinds["structural_tag"] = orjson.dumps(kinds["structural_tag"]).decode()
    return kinds


def structured_of(body: Generation) -> tuple[str, StructuredOutputsParams] | None:
    """The one constraint of a request and the field that it came in. Raises InvalidRequest for two of them."""
    given: dict[str, dict[str, Any]] = {
        name: value
        for name, value in (
            ("response_format", body.response_format),
            ("structured_outputs", body.structured_outputs),
            *(
                (f"guided_{kind}", _guided(kind, getattr(body, f"guided_{kind}")))
                for kind in ("json", "regex", "choice", "grammar")
            ),
        )
        if value is not None
    }
    if not given:
        return None
    if len(given) > 1:
        first, second, *_ = given
        raise InvalidRequest(f"{first} and {second} exclude each other", param=second)
    ((name, values),) = given.items()
    try:
        return name, StructuredOutputsParams(**values)
    except InvalidParams as error:
        raise InvalidRequest(error.message, param=error.param if name == "structured_outputs" else name) from None


def _guided(kind: str, value: Any) -> dict[str, Any] | None:
    return None if value is None else {kind: value}
