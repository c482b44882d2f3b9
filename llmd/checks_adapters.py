"""What `llmd check` and a reload say of adapters: their files against the base model's, without loading either."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from llmd.errors import AdapterError, ModelError

if TYPE_CHECKING:
    from llmd.config import Config
    from llmd.model.adapters import BaseModule
    from llmd.plugin.catalog import Catalog

_MAX_HEADER = 100 << 20  # bytes: the format's own bound
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def check_adapters(config: Config, catalog: Catalog, base: FilePath | None) -> Iterator[str]:
    """One line for each adapter of the configuration that cannot be served on the model in the folder `base`.

    Where the model's shapes are not known (its files are elsewhere, or quantized), only the adapter's own are looked at.
    """
    adapters = config.adapters
    yield from _check_merged(config, catalog)
    if not adapters.enable_lora:
        return
    if adapters.lora_dir is not None and not FilePath(adapters.lora_dir).is_dir():
        yield config.problem(("adapters", "lora_dir"), f"{adapters.lora_dir!r} is not a folder")
    modules = base_modules(base, adapters.lora_target_modules) if base is not None and adapters.lora_modules else None
    for name, path in adapters.modules().items():
        try:
            check_adapter(FilePath(path), catalog, modules, adapters.max_lora_rank)
        except AdapterError as error:
            yield config.problem(("adapters", "lora_modules"), f"{name!r} ({path}) cannot be served: {error}")


def _check_merged(config: Config, catalog: Catalog) -> Iterator[str]:
    """An adapter that goes into the weights may have any rank."""
    for index, model in enumerate(config.models):
        if model.merge_adapter is not None:
            try:
                check_adapter(FilePath(model.merge_adapter), catalog, None, sys.maxsize)
            except AdapterError as error:
                yield config.problem(
                    ("models", index, "merge_adapter"), f"{model.merge_adapter!r} cannot be merged: {error}"
                )


def check_adapter(path: FilePath, catalog: Catalog, modules: Mapping[str, BaseModule] | None, max_rank: int) -> None:
    """Raise AdapterError for an adapter whose files cannot be used; its tensors are not read."""
    from llmd.model.adapters import find_format

    find_format(path, catalog.adapter_formats).check(path, modules, max_rank)


def base_modules(folder: FilePath, targets: Sequence[str] = ()) -> dict[str, BaseModule] | None:
    """The modules of a checkpoint in safetensors that adapters may change; None where its files do not tell.

    `targets` are the last parts of their names, as `lora_target_modules` has them; none: all.
    """
    try:
        files = sorted(folder.glob("*.safetensors"))
        shapes = {name: info["shape"] for file in files for name, info in _header(file).items() if "shape" in info}
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ModelError):
        return None  # whatever is wrong with the model is told elsewhere
    if not shapes or config.get("quantization_config"):
        return None
    found = _modules(shapes, is_tied=bool(config.get("tie_word_embeddings")))
    return {
        name: base for name, base in found.items() if not targets or f".{name}".endswith(tuple(f".{t}" for t in targets))
    }


def _header(file: FilePath) -> dict[str, Any]:
    """The JSON object at a file's start (https://github.com/huggingface/safetensors#format)."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _MAX_HEADER:
            raise ModelError(f"{file.name}: its header says {size} bytes")
        found: dict[str, Any] = json.loads(stream.read(size))
    return found


def _modules(shapes: Mapping[str, list[int]], *, is_tied: bool) -> dict[str, BaseModule]:
    from llmd.model.adapters import BaseModule

    found: dict[str, BaseModule] = {}
    for tensor, shape in shapes.items():
        name, _, kind = tensor.rpartition(".")
        if kind != "weight" or len(shape) != 2:
            continue
        last = name.rpartition(".")[2]
        if last == "embed_tokens" or last.endswith("embeddings"):
            found[name] = BaseModule("embedding", shape[0], shape[1])
            if is_tied:
                found.setdefault("lm_head", BaseModule("head", shape[1], shape[0]))
        else:
            found[name] = BaseModule("head" if name == "lm_head" else "linear", shape[1], shape[0])
    return found | dict(_merged(found))


def _merged(modules: Mapping[str, BaseModule]) -> Iterator[tuple[str, BaseModule]]:
    """Linears that are served as one, under the name of the whole, and the parts with it."""
    for name in modules:
        parent, _, last = name.rpartition(".")
        for whole, parts in _MERGED.items():
            names = [f"{parent}.{part}" for part in parts]
            if last == parts[0] and all(part in modules for part in names):
                yield from ((part, modules[part]._replace(whole=f"{parent}.{whole}")) for part in names)
                size = sum(modules[part].out_features for part in names)
                yield f"{parent}.{whole}", modules[name]._replace(kind="merged", out_features=size)
