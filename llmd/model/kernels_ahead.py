"""A process beside the start on a GPU that compiles the kernels which this start will launch. Loads no torch.

    build the service ─► begin: a thread finds the GPU, looks for the mark, starts the process
    load the weights  ─► wait: until the kernels of the first steps are there; the rest follows while the model serves

What was compiled for a model, its configuration and a GPU leaves a mark in Triton's cache, and is not looked at again. A
process that fails costs nothing but time: whatever is missing is compiled where it is launched.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from llmd._version import __version__
from llmd.config import AdaptersConfig, Config, PluginsConfig
from llmd.config_text import render
from llmd.model.gpu_target import GpuTarget, find_target
from llmd.model.head_start import GPU_FILES

if TYPE_CHECKING:
    from llmd.config import ModelConfig
    from llmd.model.parts import ModelParts

log = logging.getLogger("llmd.model")

_COMMAND = (sys.executable, "-m", "llmd")
_LONGEST_S = 30.0  # that a start waits for it
_OF_MODEL = {
    "dtype", "quantization", "quantization_options", "max_model_len", "hf_overrides", "load_format", "attention_backend",
    "model_impl", "enforce_eager",
}  # fmt: skip
_OF_CACHE = {"block_size", "kv_cache_dtype"}
_OF_SCHEDULER = {"max_num_seqs", "max_num_batched_tokens"}
_OF_ADAPTERS = {"enable_lora", "max_loras", "max_lora_rank", "lora_target_modules"}


def begin(config: Config, model: ModelConfig, folder: Path, parts: ModelParts) -> None:
    """Start compiling beside whatever comes next, where there is a GPU and anything to compile."""
    if model.device == "cpu" or not any(map(os.path.exists, GPU_FILES)) or not can_compile():
        return
    ahead = _Ahead(config, model, folder, parts)
    _running.append(ahead)
    ahead.thread.start()


def wait(timeout_s: float = _LONGEST_S) -> None:
    """Until the kernels of the first steps are compiled, by all processes that were begun."""
    while _running:
        ahead = _running.pop()
        if not ahead.has_started.wait(timeout_s):
            log.warning("kernels are not compiled after %.0f s; the model starts without them", timeout_s)


def can_compile() -> bool:
    """Whether Triton is here and compiles."""
    return importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")


class _Ahead:
    """One model's process, and the thread that listens to it."""

    def __init__(self, config: Config, model: ModelConfig, folder: Path, parts: ModelParts) -> None:
        self._config, self._model, self._folder, self._parts = config, model, folder, parts
        self.has_started = threading.Event()
        self.thread = threading.Thread(target=self.run, name="llmd-kernels-ahead", daemon=True)

    def run(self) -> None:
        """Until the process has ended."""
        try:
            self._work()
        except OSError as error:
            log.info("kernels ahead: not compiled: %s", error)
        finally:
            self.has_started.set()

    def _work(self) -> None:
        target = find_target(_index(self._model.device))
        if target is None or mark_of(self._config, self._model, self._folder, self._parts, target).exists():
            return
        text = render(_only_model(self._config, self._model, self._folder, self._parts)).encode()
        with (
            open(os.memfd_create("llmd.toml"), "wb", buffering=0) as file,
            tempfile.TemporaryFile("w+", errors="replace") as complaints,
        ):
            file.write(text)
            command = [*_COMMAND, "--config", f"/proc/self/fd/{file.fileno()}", "precompile", "--device", str(target)]
            with subprocess.Popen(
                [*command, "--beside"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints,
                pass_fds=(file.fileno(),), text=True, env=_environment(),
            ) as process:  # fmt: skip
                last = self._listen(process)
            if process.returncode:
                complaints.seek(0)
                lines = complaints.read().strip().splitlines() or ["it does not say why"]
                last = f"not compiled, exit code {process.returncode}: {lines[-1]}"
            log.info("kernels ahead: %s", last)

    def _listen(self, process: subprocess.Popen[str]) -> str:
        """The last thing it says. The first is said when the kernels of the first steps are there."""
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            self.has_started.set()
            last = line.strip()
        return last


_running: list[_Ahead] = []  # begun and not waited for


def _index(device: str) -> int:
    """Of cuda:N."""
    number = device.partition(":")[2]
    return int(number) if number.isdigit() else 0


def _only_model(config: Config, model: ModelConfig, folder: Path, parts: ModelParts) -> Config:
    """What the process needs to know: no keys, nothing to fetch, the same plugins."""
    plugins = PluginsConfig(**{name: getattr(config.plugins, name) for name in ("autoload", "disable", "only", "prefer")})
    here = model.model_copy(
        update={"model": str(folder.absolute()), "tokenizer": None, "hf_token": None, "executor": "thread"}
    )
    adapters = parts.adapters or AdaptersConfig()  # this model's: others have none
    return Config(models=(here,), cache=config.cache, scheduler=config.scheduler, adapters=adapters, plugins=plugins)


def _environment() -> dict[str, str]:
    """What says something of the configuration is in the file already; the supervisor is not the process's affair."""
    return {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith("LLMD_") and "__" in name) and name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    }


def triton_cache() -> Path:
    """Where Triton keeps what it compiled (triton/knobs.py, cache_knobs)."""
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))


def mark_of(config: Config, model: ModelConfig, folder: Path, parts: ModelParts, target: GpuTarget) -> Path:
    """The file that says that all of this model's kernels were compiled for a GPU."""
    facts = {
        "model": model.model_dump(mode="json", include=_OF_MODEL),
        "cache": config.cache.model_dump(mode="json", include=_OF_CACHE),
        "scheduler": config.scheduler.model_dump(mode="json", include=_OF_SCHEDULER),
        "adapters": (parts.adapters or AdaptersConfig()).model_dump(mode="json", include=_OF_ADAPTERS),
        "parts": [sorted(family) for family in (parts.attention_backends, parts.quantizations, parts.samplers)],
        "of": [str(target), __version__, metadata.version("triton"), metadata.version("torch"), _digest_of_code()],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(_content((folder / "config.json",)))
    return triton_cache() / f"llmd-{digest.hexdigest()[:40]}.done"


@cache
def _digest_of_code() -> str:
    """Of all that has a say in what is launched."""
    import llmd_kernels

    own, kernels = Path(__file__).parent, Path(llmd_kernels.__file__).parent
    return _content(sorted((*own.glob("**/*.py"), *kernels.glob("**/*.py")))).hex()


def _content(paths: Iterable[Path]) -> bytes:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.digest()
