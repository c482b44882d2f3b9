"""What is said of mistakes in the configuration: the key, its value, what is allowed, and the closest known name."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llmd.config import KEY_HASH, KEY_NAME, Path, dotted, place_of
from llmd.config_keys import find_field, known_keys, table_type, type_options
from llmd.flags_table import why_not_built_in


class Text(str):
    """A value from the environment or a flag: its type is only known when its key is."""

    __slots__ = ()


def describe_errors(error: ValidationError, model: type[BaseModel], places: Mapping[Path, str], at: Path = ()) -> list[str]:
    """One line for each mistake that pydantic found in the table at `at`."""
    problems = []
    items = error.errors(include_url=False)
    inner = {item["loc"][:length] for item in items for length in range(len(item["loc"]))}
    for item in items:
        if item["loc"] in inner:
            continue  # wrong only because something in it is wrong
        path: Path = (*at, *item["loc"])
        place = place_of(places, path)
        text = _describe(model, item["loc"], path, item["type"], item.get("input"), item["msg"])
        problems.append(f"{place}: {text}" if place else text)
    return problems


def _describe(model: type[BaseModel], loc: Path, path: Path, kind: str, value: Any, message: str) -> str:
    if kind == "extra_forbidden":
        return unknown_key(path, known_keys(model, loc[:-1]))
    info = find_field(model, loc)
    if kind == "missing":
        return f"{dotted(path)} is not set; allowed: {allowed(info)}" if info else f"{dotted(path)} is not set"
    if info is None or kind.startswith(("value_error", "assertion")):
        return f"{dotted(path)}: {message.removeprefix('Value error, ')}"
    return f"{dotted(path)}: {shown(info, value)} is not valid; allowed: {allowed(info)}"


def unknown_key(path: Path, known: Sequence[str]) -> str:
    """The line for a key that does not exist."""
    name = str(path[-1])
    if reason := why_not_built_in(name):
        return f"{dotted(path)}: {reason}"
    return f"unknown key {dotted(path)}{did_you_mean(name, known) or allowed_keys(known)}"


def allowed_keys(known: Sequence[str]) -> str:
    """The end of a line about an unknown key that looks like none of the known ones."""
    return f"; allowed: {', '.join(known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a line about an unknown name: the closest known one."""
    closest = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {closest[0]}?" if closest else ""


def shown(info: FieldInfo, value: Any) -> str:
    """A value for an error message; secrets are not repeated."""
    if not info.repr:
        return "the value"
    text = repr(str(value)) if isinstance(value, Text) else repr(value)
    text = {"True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 80 else text[:77] + "..."


def allowed(info: FieldInfo) -> str:
    """What a key may hold, in words."""
    options = [option for option in type_options(info.annotation) if option is not type(None)]
    return " or ".join(_allowed_type(option, info) for option in options)


def _allowed_type(option: Any, info: FieldInfo) -> str:
    origin = typing.get_origin(option)
    if origin is typing.Literal:
        return ", ".join(repr(choice) for choice in typing.get_args(option))
    if origin is tuple:
        inner = typing.get_args(option)[0]
        least = "at least one " if any(getattr(item, "min_length", 0) for item in info.metadata) else ""
        table = "[[models]]" if least else "[[…]]"
        return f"{least}{table} table" if table_type(inner).model else "a list of strings"
    if origin is dict or option is dict:
        return "a table"
    if isinstance(option, type) and issubclass(option, BaseModel):
        return "a table"
    if any(getattr(item, "pattern", None) == KEY_NAME for item in info.metadata):
        return "letters, digits and '._@-', at most 64, the first a letter or digit"
    if any(getattr(item, "pattern", None) == KEY_HASH for item in info.metadata):
        return "'sha256:' and 64 hexadecimal digits"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return names.get(option, getattr(option, "__name__", str(option))) + _allowed_range(info)


def _allowed_range(info: FieldInfo) -> str:
    bounds = {
        name: getattr(item, name)
        for item in info.metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(item, name, None) is not None
    }
    if "ge" in bounds and "le" in bounds:
        return f" between {bounds['ge']} and {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " " + " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items()) if bounds else ""
