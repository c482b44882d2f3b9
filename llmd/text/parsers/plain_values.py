"""Arguments one by one: as plain text between tags, or as keyword arguments. The grammar of what the parser reads back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llmd.text.json_schemas import STRING_FORMATS, JsonSchema, change_schemas, schemas_within
from llmd.text.parsers.forms import Call, Function, GrammarWriter, Unforceable, plain_name, quoted
from llmd.text.parsers.markup_calls import PlainValue
from llmd.text.parsers.schemas import STRING, resolved, types_of

_NOTES = frozenset(
    ["title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id"]
)
_OBJECT = frozenset(["type", "properties", "required", "additionalProperties", "$defs", "definitions", "strict"]) | _NOTES
_STRING = frozenset(["type", "minLength", "maxLength", "pattern", "format", "$defs", "definitions"]) | _NOTES
_SCALARS = ({"type": "number"}, {"type": "boolean"}, {"type": "null"})
# a text that no reader takes for another type than a string
_WORDY = r"/(?s:[^\s\[\]{}()\"'+\-.,0-9<].*)/ & ~/(?i:(true|false|null|none|nan|inf|infinity)\s*)/"
_WORDY_FIRST = _WORDY.split(" & ", 1)


class Argument(NamedTuple):
    """One argument of a function."""

    key: str
    schema: JsonSchema
    is_required: bool
    root: Mapping[str, Any]


def arguments_of(function: Function) -> list[Argument]:
    """A function's arguments in their order. Raises Unforceable where its schema says more than what each may be."""
    root = function.parameters
    schema = resolved(root, root)
    if strange := sorted(schema.keys() - _OBJECT):
        raise Unforceable(f"{strange[0]!r} beside the properties of {function.name[:64]!r} cannot be held in this format")
    references = [str(part["$ref"]) for part in schemas_within(root) if "$ref" in part]
    if not all(reference.startswith(("#/$defs/", "#/definitions/")) for reference in references):
        raise Unforceable("a $ref to another place than $defs cannot be held in this format")
    properties = schema.get("properties") or {}
    required = list(schema.get("required") or ())
    unknown = [key for key in required if key not in properties]
    if unknown and schema.get("additionalProperties", True) not in (True, {}):
        raise Unforceable(f"the required property {unknown[0]!r} is not described")
    described = {**properties, **{key: {} for key in unknown}}
    return [
        Argument(key, {} if part is True else resolved(part, root), key in required, root)
        for key, part in described.items()
        if part is not False
    ]


# --- values as plain text


class MarkupStyle(NamedTuple):
    """The texts around a call's parts: {name}, {key} and {is_string} stand in them; the parser ends values at `ends`."""

    head: str
    key: str
    value_end: str
    tail: str
    ends: tuple[str, ...]

    @property
    def tells_strings(self) -> bool:
        """Whether the format says which values are strings."""
        return "{is_string}" in self.key


def markup_call(style: MarkupStyle) -> Call:
    """A call whose arguments are plain text between tags, in the order of the function's properties."""

    def call(writer: GrammarWriter, function: Function, number: int) -> str:
        terms = [writer.text(style.head.replace("{name}", plain_name(function.name)))]
        for argument in arguments_of(function):
            rule = writer.rule(" | ".join(_argument(writer, style, argument)))
            terms.append(rule if argument.is_required else f"{rule}?")
        return " ".join([*terms, writer.text(style.tail)])

    return call


def _argument(writer: GrammarWriter, style: MarkupStyle, argument: Argument) -> Iterator[str]:
    """Alternatives for one argument, its tags around it."""
    if not re.fullmatch(r"[^\s<>\"'=](?:[^<>\"'=\n]*[^\s<>\"'=])?", argument.key):
        raise Unforceable(f"the argument's name {argument.key[:64]!r} cannot be written in this format")
    opening = style.key.replace("{key}", argument.key)
    found = False
    for is_string, terms in _values(writer, style, argument):
        found = True
        yield f"{writer.text(opening.replace('{is_string}', str(is_string).lower()))} {terms}"
    if not found:
        raise Unforceable(f"no value of the argument {argument.key[:64]!r} can be written in this format")


def _values(writer: GrammarWriter, style: MarkupStyle, argument: Argument) -> Iterator[tuple[bool, str]]:
    """What the value may be, each with its end; and whether it is a string."""
    schema, root, end = argument.schema, argument.root, writer.text(style.value_end)
    types = types_of(schema, root)
    if "enum" in schema or "const" in schema:
        yield from _fixed(writer, style, schema, types)
        return
    if not schema.keys() - _NOTES:
        yield True, _string(writer, style, {}, wordy=False)
        return
    if not types:
        raise Unforceable(f"the type of the argument {argument.key[:64]!r} is not said, so that it may be read as another")
    wordy = types != STRING and not style.tells_strings
    for option in _string_options(schema, root):
        yield True, _string(writer, style, option, wordy=wordy)
    if (rest := _other_options(schema, root)) is not None:
        guarded = change_schemas(rest, lambda part: _guarded(part, style.ends))
        shared = {key: change_schemas({key: root[key]}, lambda part: _guarded(part, style.ends))[key]
                  for key in ("$defs", "definitions") if key in root}  # fmt: skip
        yield False, f"{writer.json(guarded, shared)} {end}"


def _fixed(
    writer: GrammarWriter, style: MarkupStyle, schema: JsonSchema, types: frozenset[str]
) -> Iterator[tuple[bool, str]]:
    """Values of an enum or const, those that are read back as what they are."""
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
    if schema.keys() - _NOTES - {"enum", "const", "type"}:
        raise Unforceable("an enum with more beside it cannot be held in this format")
    for value in values:
        is_string = isinstance(value, str)
        text = str(value) if is_string else json.dumps(value, ensure_ascii=False)
        fitting = frozenset({"string"}) if style.tells_strings and is_string else types
        if any(end in text for end in style.ends) or (text.startswith("\n") and style.key.endswith("\n")):
            continue
        reader = PlainValue(fitting - {"string"} if style.tells_strings and not is_string else fitting)
        read = json.loads(reader.push(text) + reader.finish())
        if type(read) is type(value) and read == value and (not types or _is_of(value, types)):
            yield is_string, writer.text(text + style.value_end)


def _is_of(value: Any, types: frozenset[str]) -> bool:
    names = {str: "string", bool: "boolean", type(None): "null", int: "integer", float: "number", dict: "object"}
    name = names.get(type(value), "array")
    return name in types or (name == "integer" and "number" in types)


def _string_options(schema: JsonSchema, root: Mapping[str, Any]) -> Iterator[JsonSchema]:
    """The schemas of the strings among what a schema allows."""
    if "string" not in types_of(schema, root):
        return
    if isinstance(schema.get("anyOf"), list) and not schema.keys() - _NOTES - {"anyOf", "$defs", "definitions"}:
        for option in schema["anyOf"]:
            yield from _string_options(resolved(option, root), root)
        return
    known = {key: value for key, value in schema.items() if key in _STRING}
    if strange := schema.keys() - _STRING - (_ELSEWHERE if types_of(schema, root) != STRING else frozenset()):
        raise Unforceable(f"{min(strange)!r} of a string cannot be held in this format")
    yield known


# what a schema for several types says of the others
_ELSEWHERE = frozenset(
    (
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "items", "minItems", "maxItems"),
        *("prefixItems", "properties", "required", "additionalProperties"),
    )
)


def _other_options(schema: JsonSchema, root: Mapping[str, Any]) -> JsonSchema | None:
    """What a schema allows besides strings; None for nothing."""
    types = types_of(schema, root)
    if "string" not in types:
        return schema
    if isinstance(schema.get("anyOf"), list):
        rests = [_other_options(resolved(option, root), root) for option in schema["anyOf"]]
        options = [rest for rest in rests if rest is not None]
        return {"anyOf": options} if options else None
    others = sorted(types - STRING)
    return {**schema, "type": others} if others else None


def _string(writer: GrammarWriter, style: MarkupStyle, schema: JsonSchema, *, wordy: bool) -> str:
    """A text that holds a string's bounds, and its end."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    wanted = [f"/(?s:.{{{least},{most}}})/" if least or most != "" else "/(?s:.*)/"]
    if "pattern" in schema:
        wanted.append(f"/{regex_within(str(schema['pattern']))}/")
    if "format" in schema:
        if schema["format"] not in STRING_FORMATS:
            raise Unforceable(f"the format {str(schema['format'])[:64]!r} of a string cannot be held in this format")
        wanted.append(f"/{regex_within(STRING_FORMATS[schema['format']])}/")
    if wordy:
        wanted += _WORDY_FIRST
    if style.key.endswith("\n"):
        wanted.append("~/\\n(?s:.*)/")  # a reader takes one line break for the format's
    wanted.append(f"~/(?s:.*({'|'.join(map(quoted, style.ends))}).*)/")
    return writer.upto(writer.terminal(" & ".join(wanted)), style.value_end)


_ANCHOR = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|(?P<anchor>[$^])|(?P<alternative>\|)|(?P<open>\()|(?P<close>\))", re.DOTALL)


def regex_within(pattern: str) -> str:
    """A pattern (ECMA 262, found anywhere) as a regular expression of the whole text, between slashes, without anchors."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not re.search(r"(?<!\\)(?:\\\\)*\\\$$", pattern)
    inner = pattern[int(begins) : len(pattern) - int(ends)]
    depth = 0
    for match in _ANCHOR.finditer(inner):
        depth += bool(match["open"]) - bool(match["close"])
        if match["anchor"] or (match["alternative"] and depth == 0 and (begins or ends)):
            raise Unforceable("a pattern with anchors within it cannot be held in this format")
    inner = inner.replace("\n", "\\n").replace("/", "\\/").replace("\\\\/", "\\/")
    return f"(?s:{'' if begins else '.*'})(?:{inner})(?s:{'' if ends else '.*'})"


# --- JSON within markup


def _guarded(schema: JsonSchema, ends: Sequence[str]) -> JsonSchema:
    """A schema whose strings cannot hold the text at which a reader would end the value."""
    if "enum" in schema or "const" in schema:
        text = json.dumps([schema.get("enum"), schema.get("const")], ensure_ascii=False)
        if any(end in text for end in ends):
            raise Unforceable("a constant has the end of its value in it")
        return schema
    if any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf")) or not schema.keys() - {"$defs", "definitions"}:
        return schema if schema else {"anyOf": [{"type": "string", "pattern": _guard(ends)}, *_SCALARS]}
    types = schema.get("type")
    names = types if isinstance(types, list) else [types]
    if types is None:
        raise Unforceable("a schema without a type cannot be held within markup")
    if "string" in names:
        schema = _with_pattern(schema, _guard(ends))
    if "array" in names and schema.get("items", True) is True:
        schema = {**schema, "items": _guarded({}, ends)}
    return _closed(schema, ends) if "object" in names else schema


def _with_pattern(schema: JsonSchema, pattern: str) -> JsonSchema:
    if "pattern" not in schema and "format" not in schema:
        return {**schema, "pattern": pattern}
    return {**schema, "allOf": [*(schema.get("allOf") or ()), {"pattern": pattern}]}


def _closed(schema: JsonSchema, ends: Sequence[str]) -> JsonSchema:
    """An object with the properties that are named, or with keys of which none ends the value."""
    properties = schema.get("properties") or {}
    if any(end in key for key in properties for end in ends):
        raise Unforceable("a key has the end of its value in it")
    if properties or "patternProperties" in schema or schema.get("additionalProperties") is False:
        return {**schema, "additionalProperties": False}
    rest = schema.get("additionalProperties", True)
    values = _guarded({}, ends) if rest in (True, {}) else rest
    return {**schema, "patternProperties": {_guard(ends): values}, "additionalProperties": False}


def _guard(ends: Sequence[str]) -> str:
    """A pattern that no text with one of the ends matches: a little less than all others, by the ends' first letters."""
    closing = "".join({end.lstrip("\n")[2] for end in ends if end.lstrip("\n").startswith("</")})
    opening = "".join({end.lstrip("\n")[1] for end in ends if not end.lstrip("\n").startswith("</")})
    plain = f"[^<\\/{opening}]"
    return f"^(?:[^<]|(?:<|<\\/)*<(?:{plain}|\\/[^<{closing}]))*(?:<|<\\/)*$"


# --- keyword arguments


def keyword_call(writer: GrammarWriter, function: Function, number: int) -> str:
    """`f(a=1, b="x")`, the values as JSON."""
    if not re.fullmatch(r"[\w.\-]+", function.name):
        raise Unforceable(f"the function's name {function.name[:64]!r} cannot be written in this format")
    first, more = "", ""  # what may come from an argument on: as the first that is written, and behind others
    for argument in reversed(arguments_of(function)):
        if not re.fullmatch(r"[\w.\-]+", argument.key):
            raise Unforceable(f"the argument's name {argument.key[:64]!r} cannot be written in this format")
        value = f"{json.dumps(argument.key + '=', ensure_ascii=False)} {writer.json(argument.schema, argument.root)}"
        if argument.is_required:
            first, more = f"{value} {more}", f'", " {value} {more}'
        else:
            first = f"({value} {more} | {first})" if first else f"({value})?"
            more = f'(", " {value})? {more}'
        first, more = writer.rule(first), writer.rule(more)
    return f"{writer.text(function.name + '(')} {first} {writer.text(')')}"
