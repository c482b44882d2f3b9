"""From files to a module with weights: built without memory, each tensor read, cast and placed one at a time.

    config.json ─► ArchitectureConfig ─► architecture.build(config, layers) on the meta device
    checkpoint  ─► tensor by tensor ─► the slot of that name ─► the layer's memory, cast on the way
                   the last tensor of a layer ─► layer.finish_weights() (repack, quantize), the original freed

So the peak is the weights and what one shard needs, whatever the number of shards.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from llmd.config import ModelConfig
from llmd.engine.executor import LoadProgress
from llmd.errors import ModelError
from llmd.model.attention import AttentionBackend, AttentionNeeds, select_backend
from llmd.model.config import ArchitectureConfig, read_config
from llmd.model.layers import Layer, Layers, Linear, Shard, WeightSlot
from llmd.model.parts import ModelParts as ModelParts
from llmd.model.quantization import Quantization, Unquantized

log = logging.getLogger("llmd.model")

_DTYPES = {
    "half": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32,
    "float32": torch.float32,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """What is known of a checkpoint's tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16" …
    file: str


class Checkpoint(Protocol):
    """Weights in files. `tensors` is asked once, for the names that are wanted, and yields in the order of the files."""

    def infos(self) -> Mapping[str, TensorInfo] | None:
        """Every tensor there is; None when it gives whatever is asked for."""

    def tensors(self, wanted: Mapping[str, WeightSlot]) -> Iterator[tuple[str, torch.Tensor, str]]:
        """(name, tensor, phase in words) of each wanted tensor, which is good until the next one is asked for."""

    def close(self) -> None:
        """Let go of the files."""


class NamedSpec(Protocol):
    """What is read of a spec that only builds."""

    @property
    def build(self) -> Callable[..., Any]: ...


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run."""

    module: nn.Module
    config: ArchitectureConfig
    backend: AttentionBackend
    backend_name: str
    dtype: torch.dtype
    device: torch.device
    weights_bytes: int
    quantization: str | None
    is_encoder: bool = False


class Blueprint(NamedTuple):
    """All decisions that need no weights."""

    config: ArchitectureConfig
    dtype: torch.dtype
    device: torch.device
    backend: AttentionBackend
    backend_name: str
    is_encoder: bool = False


def plan_model(model: ModelConfig, path: Path, parts: ModelParts, *, block_size: int, kv_cache_dtype: str) -> Blueprint:
    """Read config.json and decide device, dtype and attention backend; touches no weights."""
    config = read_config(path)
    encodes = is_encoder(config, parts)
    device = select_device(model.device)
    dtype = select_dtype(model.dtype, config, device)
    needs = attention_needs(config, dtype, device, block_size=block_size, kv_cache_dtype=kv_cache_dtype, for_encoder=encodes)
    name, backend = select_backend(needs, parts.attention_backends, model.attention_backend, parts.select_attention_backend)
    return Blueprint(config, dtype, device, backend, name, encodes)


def is_encoder(config: ArchitectureConfig, parts: ModelParts) -> bool:
    """Whether each token attends to every other. Raises ModelError for an architecture that is not known."""
    return bool(getattr(_architecture_spec(config, parts), "is_encoder", False))


def attention_needs(
    config: ArchitectureConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_size: int,
    kv_cache_dtype: str,
    for_encoder: bool = False,
) -> AttentionNeeds:
    """What this model asks of an attention backend on this device."""
    return AttentionNeeds(
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        head_dim=config.head_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        block_size=block_size,
        sliding_window=config.sliding_window,
        kv_cache_dtype=kv_cache_dtype,
        for_encoder=for_encoder,
    )


def load_model(
    model: ModelConfig,
    path: Path,
    parts: ModelParts,
    blueprint: Blueprint,
    *,
    max_model_len: int,
    report: Callable[[LoadProgress], None],
    shard: Shard | None = None,
) -> LoadedModel:
    """Build the architecture and fill it from the checkpoint; ModelError names the file or tensor that is wrong."""
    config = blueprint.config
    quantization, quantization_name = select_quantization(model, config, parts)
    layers = Layers(
        config,
        blueprint.backend,
        dtype=blueprint.dtype,
        device=blueprint.device,
        max_model_len=max_model_len,
        shard=shard,
    )
    with torch.device("meta"):
        module: nn.Module = _architecture_spec(config, parts).build(config, layers)
    module.requires_grad_(False).eval()
    slots = prepare_slots(module, quantization)
    checkpoint = open_checkpoint(model, path, parts)
    try:
        fill(module, slots, checkpoint, report)
    finally:
        checkpoint.close()
        _trim_heap()
    return LoadedModel(
        module=module,
        config=config,
        backend=blueprint.backend,
        backend_name=blueprint.backend_name,
        dtype=blueprint.dtype,
        device=blueprint.device,
        weights_bytes=sum(slot.num_bytes for slot in slots.values()),
        quantization=quantization_name,
        is_encoder=blueprint.is_encoder,
    )


def _trim_heap() -> None:
    """Give freed temporaries back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


# --- decisions


def _architecture_spec(config: ArchitectureConfig, parts: ModelParts) -> NamedSpec:
    for name in config.architectures:
        if name in parts.architectures:
            return parts.architectures[name]
    known = ", ".join(sorted(parts.architectures)) or "none"
    raise ModelError(
        f"architecture {' / '.join(config.architectures)} is not known; known are {known}. "
        "A plugin wheel may provide it: install one that registers this architecture"
    )


def select_device(name: str) -> torch.device:
    """The device that the config names, or the best that the machine has."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ModelError(f"device {name!r} is not there: this machine has {count} CUDA devices")
        return torch.device("cuda", device.index or 0)
    return torch.device("cpu")


def select_dtype(name: str, config: ArchitectureConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations; auto is the checkpoint's, with bfloat16 for float16 on a CPU."""
    if name != "auto":
        return _DTYPES[name]
    dtype = _DTYPES[config.dtype or "float32"]
    if dtype == torch.float16 and device.type == "cpu":
        log.info("float16 is slow on a CPU: bfloat16 is used")
        return torch.bfloat16
    return dtype


def select_quantization(
    model: ModelConfig, config: ArchitectureConfig, parts: ModelParts
) -> tuple[Quantization | None, str | None]:
    """What the config asks for, or what the checkpoint says it is."""
    known = ", ".join(sorted(parts.quantizations)) or "none"
    settings = config.quantization or {}
    if model.quantization is not None and model.quantization not in parts.quantizations:
        raise ModelError(f"quantization {model.quantization!r} is not known; known are {known}")
    if config.quantization is not None:
        for name, spec in parts.quantizations.items():
            quantization: Quantization = spec.build(settings)
            if model.quantization in (None, name) and quantization.detect(settings):
                return quantization, name
        kind = settings.get("quant_method")
        raise ModelError(
            f"the checkpoint is quantized by {kind!r}, which "
            + (f"is not {model.quantization!r}" if model.quantization else f"no plugin reads; known are {known}")
        )
    if model.quantization is None:
        return None, None
    spec = parts.quantizations[model.quantization]
    if not spec.online:
        raise ModelError(f"quantization {model.quantization!r} needs a checkpoint that is quantized so; this one is not")
    return spec.build(settings), model.quantization


def open_checkpoint(model: ModelConfig, path: Path, parts: ModelParts) -> Checkpoint:
    """The format that the config names, or the first that finds its files in the folder."""
    formats = parts.checkpoint_formats
    known = ", ".join(sorted(formats)) or "none"
    if model.load_format != "auto":
        if model.load_format not in formats:
            raise ModelError(f"load_format {model.load_format!r} is not known; known are 'auto', {known}")
        return formats[model.load_format].build(path, model)
    for spec in sorted(formats.values(), key=lambda spec: spec.order):
        if spec.detect(path):
            return spec.build(path, model)
    raise ModelError(f"{path.name}: no weights found; formats looked for: {known}")


# --- weights


class Slot(NamedTuple):
    """A slot and the module that is finished when all of its slots are filled."""

    slot: WeightSlot
    module: nn.Module
    num_bytes: int


def prepare_slots(module: nn.Module, quantization: Quantization | None) -> dict[str, Slot]:
    """Name the layers, give each linear its method, and list every tensor that the checkpoint must hold."""
    unquantized = Unquantized()
    slots: dict[str, Slot] = {}
    for name, child in module.named_modules():
        if isinstance(child, Layer):
            child.name = name
        if isinstance(child, Linear):
            method = quantization.method(child) if quantization is not None else None
            child.method = method or unquantized
            child.method.create_weights(child)
        elif not isinstance(child, Layer) and child._parameters:
            raise ModelError(f"{type(child).__name__} at {name!r} holds parameters but is no layer from `layers`")
        if isinstance(child, Layer):
            for slot in child.weight_slots():
                parameter = child._parameters[slot.name.rpartition(".")[2]]
                itemsize = parameter.dtype.itemsize if parameter is not None else 0
                slots[slot.name] = Slot(slot, child, torch.Size(slot.shape).numel() * itemsize)
    return slots


def fill(
    module: nn.Module, slots: Mapping[str, Slot], checkpoint: Checkpoint, report: Callable[[LoadProgress], None]
) -> None:
    """Read every slot's tensor, and finish each layer as soon as it is whole."""
    wanted = _match_names(module, slots, checkpoint.infos())
    total = sum(slot.num_bytes for slot in slots.values()) or 1
    missing: dict[nn.Module, int] = {}
    for slot in slots.values():
        missing[slot.module] = missing.get(slot.module, 0) + 1
    done = 0
    with torch.inference_mode():
        for name, tensor, phase in checkpoint.tensors({name: slot.slot for name, slot in wanted.items()}):
            slot = wanted[name]
            if tuple(tensor.shape) != slot.slot.shape:
                raise _wrong_shape(name, tuple(tensor.shape), slot.slot.shape)
            slot.slot.load(tensor)
            del tensor
            missing[slot.module] -= 1
            if not missing[slot.module] and isinstance(slot.module, Layer):
                slot.module.finish_weights()
            done += slot.num_bytes
            report(LoadProgress(phase, done / total))
    unfilled = [name for name, slot in wanted.items() if missing[slot.module]]
    if unfilled:
        raise ModelError(f"the checkpoint lacks {_some(unfilled)}")


def _match_names(module: nn.Module, slots: Mapping[str, Slot], infos: Mapping[str, TensorInfo] | None) -> dict[str, Slot]:
    """Slots by their names in the checkpoint; every missing, extra or misshapen tensor is told at once."""
    if infos is None:
        return dict(slots)
    wanted = _spelled(slots, infos, getattr(module, "weight_prefix", "model."), getattr(module, "weight_spellings", ()))
    ignored = getattr(module, "ignored_weights", ())
    absent = [name for name in wanted if name not in infos]
    if absent:
        raise ModelError(f"the checkpoint lacks {_some(absent)}")
    extra = [name for name in infos if name not in wanted and not any(fnmatch(name, pattern) for pattern in ignored)]
    if extra:
        raise ModelError(f"the checkpoint holds {_some(extra)}, for which this architecture has no place")
    for name, slot in wanted.items():
        if infos[name].shape != slot.slot.shape:
            raise _wrong_shape(name, infos[name].shape, slot.slot.shape, infos[name].file)
    return wanted


def _spelled(
    slots: Mapping[str, Slot], infos: Mapping[str, TensorInfo], prefix: str, spellings: Sequence[tuple[str, str]]
) -> dict[str, Slot]:
    """Slots by the names that this checkpoint uses: with the base model's prefix or saved without it, new or old words."""
    bare = {name.removeprefix(prefix): slot for name, slot in slots.items()}
    led = {name if name.startswith(prefix) else prefix + name: slot for name, slot in slots.items()}
    best = max((dict(slots), bare, led), key=lambda names: len(names.keys() & infos.keys()))
    found = {}
    for name, slot in best.items():
        older = (name.replace(new, old) for new, old in spellings if new in name and name not in infos)
        found[next((other for other in older if other in infos), name)] = slot
    return found


def _wrong_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...], file: str = "") -> ModelError:
    where = f" in {file}" if file else ""
    return ModelError(f"tensor {name}{where} has shape {list(found)}, config.json asks for {list(shape)}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors: {shown}{' …' if len(names) > 4 else ''}"
