"""The configuration as a commented TOML file: every key, its default, one line of comment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmd.config import Config
from llmd.config_keys import table_type
from llmd.config_messages import allowed

_HEAD = """\
# The configuration of llmd: every key with its default. A key that is commented out has no default value.
# Precedence: this file < variables such as LLMD_SERVER__PORT=8080 < flags such as --port 8080.
# `llmd check --config FILE` tells every mistake in it with its line.
"""
_PLUGIN_SETTINGS = """
# [plugins.<name>] tables hold a plugin's own settings; `llmd plugins` lists the names.
"""


def render(config: Config | None = None, sections: Mapping[str, type[BaseModel]] | None = None) -> str:
    """The file for a configuration, the defaults if none is given. `sections` are the models of plugins' tables."""
    config = config or Config()
    parts = [_HEAD]
    for name, info in Config.model_fields.items():
        value = getattr(config, name)
        tables = value if table_type(info.annotation).is_list else (value,)
        header = f"[[{name}]]" if table_type(info.annotation).is_list else f"[{name}]"
        parts += ["\n".join(_table(header, table)) + "\n" for table in tables]
        if tables == ():
            parts.append(_example(header, table_type(info.annotation).model))
        if name == "plugins":
            parts.append(_plugin_tables(value.model_extra, sections or {}) if value.model_extra else _PLUGIN_SETTINGS)
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _table(header: str, table: BaseModel) -> Iterator[str]:
    yield f"# {_summary(type(table))}"
    yield header
    for name, info in type(table).model_fields.items():
        value = getattr(table, name)
        yield f"# {_comment(info)}"
        if value is not None and (info.repr or not value):
            yield f"{name} = {_toml(value)}"
        else:
            yield f"# {name} =" + ("" if value is None else "  # set, and not shown")


def _example(header: str, model: type[BaseModel] | None) -> str:
    """A list of tables that has none: its keys with their defaults, all commented out."""
    assert model is not None
    lines = [f"# {_summary(model)}", f"# {header}"]
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True)
        value = "" if default in (None, "") else f" {_toml(default)}"
        lines += [f"#   {_comment(info)}", f"# {name} ={value}"]
    return "\n".join(lines) + "\n"


def _summary(model: type[BaseModel]) -> str:
    """A table's docstring without the name of the table in front."""
    text = (model.__doc__ or "").partition(": ")[2].strip().rstrip(".")
    return text[:1].upper() + text[1:]


def _comment(info: FieldInfo) -> str:
    bounds = allowed(info)
    told = any(word in bounds for word in ("between", "at least", "above", "'"))
    return f"{info.description} ({bounds})" if told else str(info.description)


def _plugin_tables(tables: dict[str, Any], sections: Mapping[str, type[BaseModel]]) -> str:
    """The plugins' own tables as they were given, but for values that may be secrets as far as one can tell."""
    lines = []
    for name, table in tables.items():
        fields = sections[name].model_fields if name in sections else {}
        lines.append(f"\n[plugins.{_key(name)}]")
        for key, value in table.items():
            is_public = key in fields and fields[key].repr
            lines.append(f"{_key(key)} = {_toml(value)}" if is_public else f"# {_key(key)} =  # set, and not shown")
    return "\n".join(lines)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
