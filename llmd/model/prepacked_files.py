"""Where prepacked weights lie on disk: files named by the digest of all that they were made of. Loads no torch.

    $LLMD_CACHE_DIR/prepacked/<digest>.safetensors      default: ~/.cache/llmd/prepacked

The digest covers the checkpoint, what the configuration makes of it, the code that packs, and the CPU. A checkpoint is known
by the names, sizes, times of change and samples of its files: a header or a time alone stays the same when a model that was
trained further is copied over the old one, and reading all of it would take as long as packing it again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmd.config import ModelConfig
    from llmd.model.parts import ModelParts

log = logging.getLogger("llmd.model")

SUFFIX = ".safetensors"
_WEIGHTS = ("*.safetensors", "*.gguf")
_SAMPLES = 32  # of a file, evenly spread
_SAMPLE_BYTES = 4096
_SPARE_BYTES = 1 << 30  # of the disk, left to others
_STALE_S = 3600.0  # a file that is still being written after so long belongs to a process that ended


def cache_folder() -> Path:
    """As that of the compiled kernels."""
    if folder := os.environ.get("LLMD_CACHE_DIR"):
        return Path(folder) / "prepacked"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmd" / "prepacked"


def weight_files(folder: Path) -> list[Path]:
    """The files of a model that may hold weights."""
    return sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()})


def entry_of(model: ModelConfig, folder: Path, parts: ModelParts, rank: int = 0, world: int = 1) -> Path | None:
    """The cache's file for a model, whether it is there or not; None where the model has none."""
    if not model.prepacked_cache or model.merge_adapter is not None or not (files := weight_files(folder)):
        return None
    digest = hashlib.sha256()
    chosen = (
        model.dtype, model.quantization, sorted(model.quantization_options.items(), key=repr), model.model_impl,
        sorted(model.hf_overrides.items(), key=repr), model.load_format, rank, world,
    )  # fmt: skip
    digest.update(repr((chosen, _machine())).encode())
    try:
        for path in (*files, *sorted(folder.glob("*config.json"))):
            digest.update(_facts_of(path))
        for path in _code(parts):
            digest.update(path.read_bytes())
    except OSError as error:
        log.info("prepacked weights are not kept: %s", error)
        return None
    return cache_folder() / f"{digest.hexdigest()[:40]}{SUFFIX}"


def _facts_of(path: Path) -> bytes:
    """Name, size, time of change, and samples that begin with the header."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        facts = [repr((path.name, stat.st_size, stat.st_mtime_ns)).encode()]
        for sample in range(_SAMPLES):
            file.seek(stat.st_size * sample // _SAMPLES)
            facts.append(file.read(_SAMPLE_BYTES))
    return hashlib.sha256(b"".join(facts)).digest()


def _code(parts: ModelParts) -> Iterator[Path]:
    """All code that has a say in how weights are packed: no number that someone may forget to raise."""
    import llmd_kernels

    own = Path(__file__).parent
    yield from sorted((own / "layers").glob("*.py"))
    yield from (own / "quantization.py", own / "prepacked.py")
    kernels = Path(llmd_kernels.__file__).parent
    yield from sorted(path for suffix in ("py", "h", "cpp") for path in kernels.glob(f"**/*.{suffix}"))
    modules = {module for spec in parts.quantizations.values() if (module := sys.modules.get(spec.build.__module__))}
    folders = {Path(module.__file__).parent for module in modules if module.__file__}
    for folder in sorted(folders):
        yield from sorted(folder.glob("*.py"))


def _machine() -> tuple[str, ...]:
    """What a layout may depend on: the kind of CPU, and whether kernels can be compiled."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()[:40]
    except OSError:
        lines = [platform.processor()]
    kind = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return (platform.machine(), *kind, str(shutil.which(os.environ.get("CXX", "g++"))))


def is_ours(path: Path) -> bool:
    """Only what this user wrote, and nobody else can write, is believed."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_uid == os.geteuid() and not stat.st_mode & 0o022


def make_room(folder: Path, size: int, max_bytes: int) -> str | None:
    """Let go of what was not used for longest until `size` more bytes fit; why they do not, or None. Raises OSError."""
    if size > max_bytes:
        return f"they take {size} bytes, prepacked_cache_bytes allows {max_bytes}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_ours(folder):
        return f"{folder} is not this user's own"
    _drop_stale(folder)
    entries = [(path.stat(), path) for path in folder.glob(f"*{SUFFIX}")]
    held = sum(stat.st_size for stat, _ in entries)
    for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime):
        if held + size <= max_bytes:
            break
        log.debug("prepacked weights %s are dropped: there are others", path.name)
        path.unlink(missing_ok=True)
        held -= stat.st_size
    if shutil.disk_usage(folder).free < size + _SPARE_BYTES:
        return f"the disk of {folder} is nearly full"
    return None


def _drop_stale(folder: Path) -> None:
    for path in folder.glob("*.tmp"):
        if time.time() - path.stat().st_mtime > _STALE_S:
            path.unlink(missing_ok=True)


def drop(paths: Iterable[Path]) -> None:
    """Remove files that nobody can use; one that cannot be removed is in nobody's way."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.debug("%s cannot be removed: %s", path, error)
