"""What loading can begin with while torch, which takes longer than all the rest, is imported. Loads no torch."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmd.model import huge_pages
from llmd.model.memory_room import free_memory
from llmd.model.prepacked_files import entry_of, weight_files

if TYPE_CHECKING:
    from llmd.config import ModelConfig
    from llmd.model.parts import ModelParts

log = logging.getLogger("llmd.model")

GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
_CACHED = 0.5  # of free memory: files beyond are read once, when they are needed
_QUANTIZED = 0.2  # of the files: beside it the largest tensor has to lie as it was, and once more quantized


def head_start(model: ModelConfig, folder: Path, parts: ModelParts) -> None:
    """Read the files that will be needed ahead, and for a CPU make memory for the weights ready, in threads."""
    files = weight_files(folder)
    if model.device != "cpu" and not (model.device == "auto" and not any(map(os.path.exists, GPU_FILES))):
        if model.load_format != "dummy" and sum(path.stat().st_size for path in files) < free_memory() * _CACHED:
            _in_thread(files)
        return
    entry = entry_of(model, folder, parts)
    if entry is not None and entry.is_file():
        files = [entry]
    elif not files:
        return
    size = sum(path.stat().st_size for path in files)
    if model.quantization is not None and files[0] != entry:
        size = int(size * _QUANTIZED)
    _in_thread(files)
    huge_pages.prepare(size + size // 64)  # room for the gaps between tensors


def _in_thread(files: Sequence[Path]) -> None:
    threading.Thread(target=_read_ahead, args=(files,), name="llmd-read-ahead", daemon=True).start()


def _read_ahead(paths: Sequence[Path]) -> None:
    """Have the system read files into its cache; blocks as long as it likes to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        try:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError as error:  # whoever needs the file will say so
            log.debug("%s cannot be read ahead: %s", path.name, error)
