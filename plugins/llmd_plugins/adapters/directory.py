"""Adapters by their folders: `[adapters] lora_dir` has one for each name, found when a request first asks for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmd.api.v1 import hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import AdaptersConfig


@hookimpl
def llmd_resolve_adapter(name: str, config: AdaptersConfig) -> str | None:
    """The subfolder of that name; a link may lead elsewhere, for only who owns the folder can set one."""
    if config.lora_dir is None or not is_plain(name):
        return None
    path = Path(config.lora_dir).absolute() / name
    return str(path) if path.is_dir() else None


def is_plain(name: str) -> bool:
    """Whether a name from a request can be that of a subfolder and of nothing else."""
    separators = {os.sep, os.altsep or os.sep, "/", "\\", "\0"}
    return name.isprintable() and not name.startswith(".") and not separators.intersection(name) and len(name) <= 255
