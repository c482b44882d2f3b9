"""adapter_model.safetensors: the tensors of a PEFT adapter, each checked against the module of the base that it changes.

base_model.model.<module>.lora_A.weight [r, in]      .lora_B.weight [out, r]     .lora_B.bias [out]
                          lora_embedding_A [r, n]    lora_embedding_B [out, r]   lora_magnitude_vector [out]
                          bias, base_layer.bias [out]         weight, base_layer.weight: a table saved along with it
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open

from llmd.api.v1 import Adapter, AdapterError, BaseModule, LowRank, find_module
from llmd_plugins.adapters.peft_config import CONFIG, PeftConfig, read_config

if TYPE_CHECKING:  # a check of the files does without it
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_PREFIXES = ("base_model.model.", "base_model.")
_DTYPES = ("F32", "F16", "BF16", "F64")
_KINDS = {
    "lora_A.weight": "a", "lora_embedding_A": "a", "lora_B.weight": "b", "lora_embedding_B": "b", "lora_B.bias": "b_bias",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude", "base_layer.bias": "bias",
    "bias": "bias", "base_layer.weight": "weight", "weight": "weight",
}  # fmt: skip
_SUFFIX = re.compile(rf"(.+?)\.({'|'.join(sorted(map(re.escape, _KINDS), key=len, reverse=True))})")


class _Entry(NamedTuple):
    """A tensor of the file: its name and shape there."""

    name: str
    shape: tuple[int, ...]


class PeftFormat:
    """Reads LoRA and DoRA of linears, the embedding and the head."""

    def detect(self, path: Path) -> bool:
        return (path / CONFIG).is_file()

    def load(self, path: Path, modules: Mapping[str, BaseModule], max_rank: int) -> Adapter:
        config = read_config(path)
        with _opened(path, "pt") as tensors:
            return _read(tensors, _checked(tensors, config, modules, max_rank), config)

    def check(self, path: Path, modules: Mapping[str, BaseModule] | None, max_rank: int) -> None:
        config = read_config(path)
        with _opened(path, "numpy") as tensors:
            if modules is not None:
                _checked(tensors, config, modules, max_rank)
            elif config.rank > max_rank:
                raise AdapterError(f"{CONFIG}: rank {config.rank} is above max_lora_rank ({max_rank})")


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[safe_open]:
    try:
        with safe_open(_find_weights(path), framework=framework) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{WEIGHTS} cannot be read: {error}") from None


def _checked(
    tensors: safe_open, config: PeftConfig, modules: Mapping[str, BaseModule], max_rank: int
) -> dict[str, dict[str, _Entry]]:
    """The file's tensors by module and kind, each with the name and shape it must have."""
    found = _by_module(_entries(tensors), modules)
    for module, kinds in found.items():
        _check_module(module, kinds, modules[module], config, max_rank)
    _check_complete(config, found, modules)
    return found


def _find_weights(path: Path) -> Path:
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    pickles = [name for name in _PICKLES if (path / name).exists()]
    if pickles:
        raise AdapterError(f"{pickles[0]} is a pickle, which can run code; save the adapter as {WEIGHTS}")
    raise AdapterError(f"{WEIGHTS} is missing")


def _entries(tensors: safe_open) -> Iterator[_Entry]:
    for name in tensors.keys():  # noqa: SIM118 - a file, not a dict
        part = tensors.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise AdapterError(f"tensor {name} has dtype {part.get_dtype()}; known are {', '.join(_DTYPES)}")
        yield _Entry(name, tuple(part.get_shape()))


def _by_module(entries: Iterator[_Entry], modules: Mapping[str, BaseModule]) -> dict[str, dict[str, _Entry]]:
    """The base's modules that the file changes, each with its tensors by kind."""
    found: dict[str, dict[str, _Entry]] = {}
    for entry in entries:
        bare = next((entry.name.removeprefix(prefix) for prefix in _PREFIXES if entry.name.startswith(prefix)), entry.name)
        match = _SUFFIX.fullmatch(bare)
        module = find_module(match[1], modules) if match else None
        if match is None or module is None:
            raise AdapterError(f"tensor {entry.name} belongs to no module of the base model that adapters may change")
        kinds = found.setdefault(module, {})
        kind = _KINDS[match[2]]
        if kind in kinds:
            raise AdapterError(f"tensors {kinds[kind].name} and {entry.name} are the same")
        kinds[kind] = entry
    return found


def _check_module(module: str, kinds: Mapping[str, _Entry], base: BaseModule, config: PeftConfig, max_rank: int) -> None:
    """All that a module's tensors must be, before any is read."""
    rank = config.rank_of(module)
    is_low_rank = any(kind in kinds for kind in ("a", "b", "b_bias", "magnitude"))
    if is_low_rank:
        _check_kinds(module, kinds, base, config)
        if rank > max_rank:
            raise AdapterError(f"tensor {kinds['a'].name}: rank {rank} is above max_lora_rank ({max_rank})")
    shapes = {
        "a": (rank, base.in_features),
        "b": (base.out_features, rank),
        "weight": (base.in_features, base.out_features)
        if base.kind == "embedding"
        else (base.out_features, base.in_features),
    }
    for kind, entry in kinds.items():
        shape = shapes.get(kind, (base.out_features,))
        if entry.shape != shape:
            raise AdapterError(
                f"tensor {entry.name} has shape {list(entry.shape)}, the base model and {CONFIG} ask for {list(shape)}"
            )


def _check_kinds(module: str, kinds: Mapping[str, _Entry], base: BaseModule, config: PeftConfig) -> None:
    for kind, is_wanted in (("a", True), ("b", True), ("magnitude", config.use_dora)):
        if is_wanted and kind not in kinds:
            raise AdapterError(f"the adapter lacks tensor {_name(kind, base)} of {module}")
    for kind, key, is_wanted in (
        ("magnitude", "use_dora", config.use_dora),
        ("b_bias", "lora_bias", config.lora_bias),
        ("bias", "bias", config.bias != "none"),
    ):
        if kind in kinds and not is_wanted:
            raise AdapterError(f"tensor {kinds[kind].name} is there though {CONFIG} does not set {key}")


def _name(kind: str, base: BaseModule) -> str:
    names = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    return f"lora_embedding_{kind.upper()}" if base.kind == "embedding" and kind != "magnitude" else names[kind]


def _check_complete(
    config: PeftConfig, found: Mapping[str, Mapping[str, _Entry]], modules: Mapping[str, BaseModule]
) -> None:
    """Every module that the config targets has its tensors, itself or within a merged one, and there are some."""
    lacking = [
        name
        for name, base in modules.items()
        if config.wants(name, base.kind) and "a" not in found.get(name, ()) and base.whole not in found
    ]
    if lacking:
        more = f" and of {len(lacking) - 1} more modules" if len(lacking) > 1 else ""
        raise AdapterError(f"the adapter lacks tensor {_name('a', modules[lacking[0]])} of {lacking[0]}{more}")
    if not any("a" in kinds for kinds in found.values()):
        raise AdapterError(f"{WEIGHTS} holds no LoRA tensor")


def _read(tensors: safe_open, found: Mapping[str, Mapping[str, _Entry]], config: PeftConfig) -> Adapter:
    def take(entry: _Entry | None) -> Tensor | None:
        return None if entry is None else _finite(entry.name, _copy(tensors, entry))

    low_rank: dict[str, LowRank] = {}
    biases: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for module, kinds in found.items():
        a, b = take(kinds.get("a")), take(kinds.get("b"))
        if a is not None and b is not None:
            low_rank[module] = LowRank(
                a=a,
                b=b,
                scaling=config.scaling_of(module, a.shape[0]),
                b_bias=take(kinds.get("b_bias")),
                magnitude=take(kinds.get("magnitude")),
            )
        if "bias" in kinds:
            biases[module] = _copy(tensors, kinds["bias"])
        if "weight" in kinds:
            copies[module] = _copy(tensors, kinds["weight"])
    return Adapter(modules=low_rank, biases=biases, copies=copies)


def _copy(tensors: safe_open, entry: _Entry) -> Tensor:
    """In memory of its own: the file may be written again while the adapter is served."""
    return tensors.get_tensor(entry.name).clone()


def _finite(name: str, tensor: Tensor) -> Tensor:
    import torch

    if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):  # a NaN or an infinity stays one in a sum
        raise AdapterError(f"tensor {name} holds numbers that are not finite")
    return tensor
