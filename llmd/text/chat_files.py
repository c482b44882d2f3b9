"""Where a model's folder keeps its chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmd.errors import ModelError


def read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name → template; files of their own go before tokenizer_config.json, as in transformers."""
    return _from_files(path) or _from_config(config)


def _from_files(path: Path) -> dict[str, str]:
    files = {"default": path / "chat_template.jinja"}
    files.update((file.stem, file) for file in sorted((path / "additional_chat_templates").glob("*.jinja")))
    return {name: _read(file) for name, file in files.items() if file.is_file()}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"the chat template {file.name} cannot be read ({error})") from error


def _from_config(config: Mapping[str, Any]) -> dict[str, str]:
    """The forms of tokenizer_config.json: one string, a map, or a list of {"name", "template"}."""
    value = config.get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair):
        return dict(value)
    if value is not None:
        raise ModelError("chat_template in tokenizer_config.json must be a string or a list of {name, template}")
    return {}
