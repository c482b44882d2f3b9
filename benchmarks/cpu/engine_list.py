"""Which engines there are, which interpreter has each, and which files it loads."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .process import Command

FORMATS = ("bf16", "int8", "int4")
LLMD = "llmd"
LLMD_FRESH = "llmd-fresh"  # without the prepacked weights that an earlier start left; only its start is measured
LLMD_HTTP = "llmd-http"
OURS = (LLMD, LLMD_FRESH, LLMD_HTTP)
_PROBE_S = 60


class EngineSpec(NamedTuple):
    """An engine that can be measured."""

    adapter: str
    module: str  # what an interpreter must be able to import
    formats: tuple[str, ...]
    model: str  # name of its model's file or folder, of {shape} and {format}
    preloaded: tuple[str, ...] = ()  # libraries in the interpreter's lib folder
    settings: tuple[tuple[str, Any], ...] = ()  # what its adapter passes on besides


_CHECKPOINT = "{shape}-bf16"
ENGINES: Mapping[str, EngineSpec] = {
    LLMD: EngineSpec("llmd", "llmd", FORMATS, _CHECKPOINT),
    LLMD_FRESH: EngineSpec("llmd", "llmd", FORMATS, _CHECKPOINT, settings=(("models.prepacked_cache", False),)),
    LLMD_HTTP: EngineSpec("llmd_http", "llmd", FORMATS, _CHECKPOINT),
    "llama.cpp": EngineSpec("llama_cpp", "llama_cpp", FORMATS, "{shape}-{format}.gguf"),
    "openvino": EngineSpec("openvino", "openvino_genai", FORMATS, "{shape}-openvino-{format}"),
    "vllm": EngineSpec("vllm", "vllm", ("bf16",), _CHECKPOINT, ("libiomp5.so",)),
    "transformers": EngineSpec("transformers", "transformers", ("bf16",), _CHECKPOINT),
}


def has_module(python: str, module: str) -> bool:
    """Whether the interpreter finds the module; it is not imported."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, timeout=_PROBE_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def interpreters(folders: Iterable[Path]) -> list[str]:
    """The interpreters of virtual environments: each folder is one, or holds several."""
    found = []
    for folder in folders:
        for candidate in (folder, *sorted(folder.iterdir() if folder.is_dir() else ())):
            if (python := candidate / "bin" / "python").exists():
                found.append(str(python))
    return found


def find_engines(
    named: Mapping[str, str], pythons: Iterable[str], has: Callable[[str, str], bool] = has_module
) -> tuple[dict[str, str], dict[str, str]]:
    """The interpreter of each engine, and why the others are left out; those named by the user go first.

    Raises ValueError where a named interpreter does not have its engine.
    """
    found, left_out, pythons = {}, {}, list(pythons)
    for name, spec in ENGINES.items():
        if name in named:
            if not has(named[name], spec.module):
                raise ValueError(f"--engine {name}: {named[name]} has no module {spec.module}")
            found[name] = named[name]
        elif python := next((python for python in pythons if has(python, spec.module)), None):
            found[name] = python
        else:
            left_out[name] = f"no interpreter has the module {spec.module}"
    return found, left_out


def command(name: str, python: str, threads: int) -> Command:
    """How its process is started. Engines keep their own ways with threads, only the number is set."""
    libraries = [Path(python).parent.parent / "lib" / library for library in ENGINES[name].preloaded]
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if present := [str(library) for library in libraries if library.exists()]:
        environment["LD_PRELOAD"] = os.pathsep.join([*present, *filter(None, [os.environ.get("LD_PRELOAD")])])
    return Command(python, ENGINES[name].adapter, environment)
