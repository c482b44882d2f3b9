"""A GGUF file as the folder that a model is to all others: config.json, the tokenizer's files, and a link to the weights.

The folder is kept in the user's cache under a name that follows from the file, its size and its time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ModelError
from llmd_plugins.checkpoints.gguf.config import eos_token_ids, make_config
from llmd_plugins.checkpoints.gguf.header import GgufHeader, read_gguf
from llmd_plugins.checkpoints.gguf.tokenizer import make_tokenizer

if TYPE_CHECKING:
    from llmd.api.v1 import LoadProgress, ModelConfig

_REVISION = 1  # of what is written; folders of others are made anew
_HUB_FILE = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)/((?:[\w .-]+/)*[\w .-]+\.gguf)", re.ASCII)
_HUB_KIND = re.compile(r"([\w][\w.-]*/[\w][\w.-]*):([\w.-]+)", re.ASCII)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def claims(config: ModelConfig) -> bool:
    """A .gguf file, a folder of one without config.json, or either at the hub: owner/name/file.gguf, owner/name:Q4_K_M."""
    name = config.model
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        return True
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    return not path.exists() and bool(_HUB_KIND.fullmatch(name))


def check(config: ModelConfig) -> str | None:
    """What is wrong with a file that is here."""
    if not _is_here(config.model):
        return None
    try:
        make_folder(find_file(config.model))
    except ModelError as error:
        return str(error)
    return None


def resolve(config: ModelConfig, report: Callable[[LoadProgress], None]) -> Path:
    """The folder, after a download where the file is at the hub."""
    if _is_here(config.model):
        return make_folder(find_file(config.model))
    return make_folder(_fetch(config))


def _is_here(name: str) -> bool:
    return Path(name).expanduser().exists() or not (_HUB_FILE.fullmatch(name) or _HUB_KIND.fullmatch(name))


def find_file(name: str) -> Path:
    """The file, the only one of a folder, or the first part of one. Raises ModelError."""
    path = Path(name).expanduser().absolute()  # a file of the hub's cache is a link to one of another name
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(f"model {name!r} does not exist")
    files = sorted(path.glob("*.gguf"))
    whole = [file for file in files if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(whole) != 1:
        names = ", ".join(file.name for file in whole) or "none"
        raise ModelError(f"model {name!r} must be one .gguf file; the folder holds {names}")
    return whole[0]


def _fetch(config: ModelConfig) -> Path:
    """Download the file, or all parts of it; what is in the hub's cache is not asked for again."""
    from huggingface_hub import snapshot_download

    file, kind = _HUB_FILE.fullmatch(config.model), _HUB_KIND.fullmatch(config.model)
    if file is not None:
        repo, patterns = file[1], [_SPLIT.sub("-?????-of-?????.gguf", file[2])]
    else:
        assert kind is not None
        repo, words = kind[1], {kind[2], kind[2].upper(), kind[2].lower()}
        patterns = [
            f"{start}{word}{end}" for word in words for start in ("", "*[-._/]") for end in (".gguf", "-?????-of-?????.gguf")
        ]
    try:
        folder = Path(
            snapshot_download(
                repo, revision=config.revision, token=config.hf_token, cache_dir=config.download_dir, allow_patterns=patterns
            )
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model {config.model!r} cannot be fetched from the hub: {reason}") from error
    found = sorted(path for pattern in patterns for path in folder.rglob("*.gguf") if _is_like(folder, path, pattern))
    if not found:
        raise ModelError(f"model {config.model!r}: its repository at the hub holds no such .gguf file")
    return found[0]


def _is_like(folder: Path, path: Path, pattern: str) -> bool:
    return fnmatchcase(path.relative_to(folder).as_posix(), pattern)


def make_folder(file: Path) -> Path:
    """Write the folder of a file unless it is there. Raises ModelError."""
    try:
        facts = file.stat()
        identity = f"{_REVISION}\0{file}\0{facts.st_size}\0{facts.st_mtime_ns}"
        folder = _cache() / f"{file.stem[:80]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        if not (folder / "config.json").is_file():
            _write(folder, read_gguf(file))
    except OSError as error:
        raise ModelError(f"{file.name}: config.json and tokenizer.json cannot be written: {error}") from None
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmd" / "gguf"


def _write(folder: Path, header: GgufHeader) -> None:
    """All files beside, then in place at once: another process may be at the same."""
    tokenizer, tokenizer_config = make_tokenizer(header.metadata)
    texts = {
        "config.json": json.dumps(make_config(header, _rope_divisors(header)), indent=2),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(_generation_config(header.metadata), indent=2),
    }
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf-8")
        for file in header.files:
            (made / file.name).symlink_to(file)
        if not folder.exists():
            made.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # nobody else was first
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _rope_divisors(header: GgufHeader) -> list[float] | None:
    entry = header.tensors.get("rope_freqs.weight")
    if entry is None:
        return None
    if entry.type.name != "F32" or len(entry.shape) != 1:
        raise ModelError(f"tensor rope_freqs.weight of the GGUF file must be F32 of one dimension, is {entry.type.name}")
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        return list(struct.unpack(f"<{entry.shape[0]}f", file.read(entry.num_bytes)))


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    eos = eos_token_ids(metadata)
    found: dict[str, Any] = {"eos_token_id": eos} if eos else {}
    for key, name in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float):
            found[name] = float(f"{value:.7g}") if isinstance(value, float) else value
    return found
