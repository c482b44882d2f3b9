"""A folder on this machine that holds a model's files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmd.api.v1 import ModelError, ModelSourceSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import LoadProgress, ModelConfig

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)


def claims(config: ModelConfig) -> bool:
    """A folder that is there, or a name that can only be a path: it starts with . / or ~, or is too deep for a hub."""
    name = config.model
    return name.startswith((".", "/", "~", os.sep)) or not _HUB_NAME.fullmatch(name) or Path(name).is_dir()


def why_not(config: ModelConfig) -> str | None:
    """What keeps the folder from being a model; None if nothing does."""
    path = Path(config.model).expanduser()
    if not path.exists():
        return f"{config.model!r} does not exist; allowed: a folder with config.json, a hub name, or 'demo'"
    if not path.is_dir():
        return f"{config.model!r} is not a folder; allowed: a folder with config.json and *.safetensors"
    if not (path / "config.json").is_file():
        return f"{config.model!r} holds no config.json, so it is not a model's folder"
    if not os.access(path / "config.json", os.R_OK):
        return f"{config.model!r}: config.json may not be read by this user"
    return None


def _resolve(config: ModelConfig, report: Callable[[LoadProgress], None]) -> Path:
    if reason := why_not(config):
        raise ModelError(f"model {reason}")
    return Path(config.model).expanduser().resolve()


@hookimpl
def llmd_register_model_sources() -> list[ModelSourceSpec]:
    """Local folders."""
    return [
        ModelSourceSpec(
            name="local",
            summary="a folder on this machine",
            claims=claims,
            resolve=_resolve,
            check=why_not,
            order=10,
        )
    ]
