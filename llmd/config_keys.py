"""The keys of the configuration, as its models have them: which there are, what they hold, where a key's field is."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmd.config import Path


class TableType(NamedTuple):
    """Which model a key holds, alone or as a list; None: it holds a value."""

    model: type[BaseModel] | None
    is_list: bool


def table_type(annotation: Any) -> TableType:
    """Whether a key holds a table or a list of tables."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return TableType(annotation, False)
    if typing.get_origin(annotation) is tuple:
        return TableType(table_type(typing.get_args(annotation)[0]).model, True)
    return TableType(None, False)


def type_options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def config_keys(model: type[BaseModel], prefix: Path = ()) -> Iterator[Path]:
    """Every key of a model; a list of tables stands with its first element."""
    for name, info in model.model_fields.items():
        inner, is_list = table_type(info.annotation)
        if inner is None:
            yield (*prefix, name)
        else:
            yield from config_keys(inner, (*prefix, name, 0) if is_list else (*prefix, name))


def known_keys(model: type[BaseModel], loc: Path) -> list[str]:
    """The keys of the table at `loc`."""
    table: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, str) and table is not None:
            info = table.model_fields.get(part)
            table = table_type(info.annotation).model if info else None
    return list(table.model_fields) if table else []


def find_field(model: type[BaseModel], loc: Path) -> FieldInfo | None:
    """The field that a validation error is about; an element of a list is spoken of by its list."""
    table: type[BaseModel] | None = model
    info = None
    for part in loc:
        if isinstance(part, str) and table is not None and part in table.model_fields:
            info = table.model_fields[part]
            table = table_type(info.annotation).model
    return info


def field_of(model: type[BaseModel], path: Path) -> FieldInfo:
    """The field of a key that exists."""
    info = find_field(model, path)
    assert info is not None, path
    return info
