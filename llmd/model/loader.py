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
from typing import NamedTuple, Protocol

import torch
from torch import nn

from llmd.config import ModelConfig
from llmd.engine.executor import LoadProgress
from llmd.errors import ModelError
from llmd.model.adapter_merging import merge
from llmd.model.architectures import select_architecture, spell_config
from llmd.model.attention import AttentionBackend, AttentionNeeds, select_backend
from llmd.model.config import ArchitectureConfig, read_config
from llmd.model.layers import Embedding, Layer, Layers, Linear, LMHead, Shard, WeightSlot
from llmd.model.parts import ModelParts as ModelParts
from llmd.model.quantization import Quantization, Unquantized
from llmd.model.quantization_choice import candidates, unreadable

log = logging.getLogger("llmd.model")

_TRIMS = 16  # of the heap, while a checkpoint loads

_DTYPES = {
    "half": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32,
    "float32": torch.float32,
}  # fmt: skip
# Static scales of KV caches and attention, as llm-compressor, AutoFP8 and ModelOpt save them: what a cache in eight bits
# needs it takes from each token (see llmd_kernels.quantized_kv), and attention computes in floats.
_KV_SCALES = ("*.k_scale", "*.v_scale", "*.kv_scale", "*.q_scale", "*.prob_scale", "*.prob_output_scale", "*.k_zero_point",
              "*.v_zero_point", "*_proj.output_scale")  # fmt: skip
_PLAIN_FLOATS = {"float16", "bfloat16", "float32", "float64", "float8_e8m0fnu"}  # the last holds powers of two, for scales
_WIDE_INTS = {"int32", "int64"}


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


def plan_model(
    model: ModelConfig,
    path: Path,
    parts: ModelParts,
    *,
    block_size: int,
    kv_cache_dtype: str,
    device: torch.device | None = None,
) -> Blueprint:
    """Read config.json and decide device, dtype and attention backend; touches no weights.

    `device`: plan for this one, though it may not be here.
    """
    config = read_model_config(model, path, parts)
    encodes = is_encoder(config, parts, model.model_impl)
    device = device or select_device(model.device)
    dtype = select_dtype(model.dtype, config, device)
    needs = attention_needs(config, dtype, device, block_size=block_size, kv_cache_dtype=kv_cache_dtype, for_encoder=encodes)
    name, backend = select_backend(needs, parts.attention_backends, model.attention_backend, parts.select_attention_backend)
    return Blueprint(config, dtype, device, backend, name, encodes)


def read_model_config(model: ModelConfig, path: Path, parts: ModelParts) -> ArchitectureConfig:
    """config.json in the words of the architecture that serves it. Raises ModelError for one that is not known."""
    return read_config(path, model.hf_overrides, lambda raw: spell_config(raw, parts.architectures, model.model_impl))


def is_encoder(config: ArchitectureConfig, parts: ModelParts, model_impl: str = "auto") -> bool:
    """Whether each token attends to every other."""
    return bool(getattr(select_architecture(config.raw, parts.architectures, model_impl).spec, "is_encoder", False))


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
        soft_cap=config.soft_cap,
        has_sinks=config.has_sinks,
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
    module, quantization, quantization_name = build_empty(model, parts, blueprint, max_model_len=max_model_len, shard=shard)
    slots = prepare_slots(module, quantization)
    if model.merge_adapter is not None:
        merged = merge(
            module, {name: slot.slot for name, slot in slots.items()}, Path(model.merge_adapter), parts.adapter_formats
        )
        slots = {name: slot._replace(slot=merged[name]) for name, slot in slots.items()}
    ignored = (*_KV_SCALES, *getattr(module, "ignored_weights", ()), *getattr(quantization, "ignored_weights", ()))
    checkpoint = open_checkpoint(model, path, parts)
    try:
        fill(module, slots, checkpoint, report, ignored)
    finally:
        checkpoint.close()
        _trim_heap()
    return LoadedModel(
        module=module,
        config=blueprint.config,
        backend=blueprint.backend,
        backend_name=blueprint.backend_name,
        dtype=blueprint.dtype,
        device=blueprint.device,
        weights_bytes=held_bytes(module),
        quantization=quantization_name,
        is_encoder=blueprint.is_encoder,
    )


def build_empty(
    model: ModelConfig,
    parts: ModelParts,
    blueprint: Blueprint,
    *,
    max_model_len: int,
    shard: Shard | None = None,
    device: torch.device | None = None,
) -> tuple[nn.Module, Quantization | None, str | None]:
    """The architecture without memory, and how its weights are stored. `device`: where they will be, if not as planned."""
    config = blueprint.config
    quantization, name = select_quantization(model, config, parts, blueprint.device)
    device = device or blueprint.device
    layers = Layers(
        config, blueprint.backend, dtype=blueprint.dtype, device=device, max_model_len=max_model_len, shard=shard
    )
    with torch.device("meta"):
        module = _build(model, config, parts, layers)
    return module.requires_grad_(False).eval(), quantization, name


def _build(model: ModelConfig, config: ArchitectureConfig, parts: ModelParts, layers: Layers) -> nn.Module:
    choice = select_architecture(config.raw, parts.architectures, model.model_impl)
    if choice.is_fallback:
        names = " / ".join(config.architectures)
        log.warning("%s runs through Transformers' code, which is slower than an architecture of llmd's own", names)
    assert choice.spec is not None
    module: nn.Module = choice.spec.build(config, layers)
    return module


def _trim_heap() -> None:
    """Give freed temporaries back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


# --- decisions


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
    model: ModelConfig, config: ArchitectureConfig, parts: ModelParts, device: torch.device
) -> tuple[Quantization | None, str | None]:
    """What the config asks for, or what the checkpoint says it is. Raises ModelError for what the device cannot run."""
    quantization, name = _find_quantization(model, config, parts)
    devices = () if name is None else parts.quantizations[name].devices
    if devices and device.type not in devices:
        able = [other for other, spec in parts.quantizations.items() if not spec.devices or device.type in spec.devices]
        raise ModelError(
            f"quantization {name!r} runs on {' or '.join(devices)}, this model is on {device.type}; "
            f"what {device.type} can run: {', '.join(sorted(able)) or 'nothing'}"
        )
    return quantization, name


def _find_quantization(
    model: ModelConfig, config: ArchitectureConfig, parts: ModelParts
) -> tuple[Quantization | None, str | None]:
    asked, settings, specs = model.quantization, config.quantization, parts.quantizations
    names = candidates(asked, settings, specs)
    if model.quantization_options and (settings is not None or asked is None):
        why = "none is named" if settings is None else "this checkpoint is quantized already"
        raise ModelError(f"quantization_options are for a method that quantizes while loading, and {why}")
    for name in names:
        quantization: Quantization = specs[name].build(model.quantization_options if settings is None else settings)
        if settings is None or quantization.detect(settings):
            return quantization, name
    if settings is not None:
        raise unreadable(asked, settings, specs)
    return None, None


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


def _slot(slot: WeightSlot, module: nn.Module) -> Slot:
    itemsize = slot.dtype.itemsize if slot.dtype is not None else 0
    return Slot(slot, module, max(0, torch.Size(slot.shape).numel()) * itemsize)  # what is of any length is short


def prepare_slots(module: nn.Module, quantization: Quantization | None) -> dict[str, Slot]:
    """Name the layers, give each linear its method, and list every tensor that the checkpoint must hold."""
    slots: dict[str, Slot] = {}
    for name, child in list(module.named_modules()):
        if isinstance(child, Layer):
            child.name = name
            _give_method(child, quantization)
            for slot in child.weight_slots():
                slots[slot.name] = _slot(slot, child)
        elif child._parameters:
            raise ModelError(f"{type(child).__name__} at {name!r} holds parameters but is no layer from `layers`")
    return slots


def _give_method(layer: Layer, quantization: Quantization | None) -> None:
    """Linears get a method; a head of its own gets one where the quantization has a `head_method`."""
    if isinstance(layer, Linear):
        method = quantization.method(layer) if quantization is not None else None
        layer.method = method or Unquantized()
        layer.method.create_weights(layer)
    elif isinstance(layer, LMHead) and not layer.is_tied:
        choose = getattr(quantization, "head_method", None)
        linear = layer.as_linear()
        if choose is not None and (head_method := choose(linear)) is not None:
            layer.quantize(linear, head_method)
    elif isinstance(layer, Embedding) and layer.holds_tokens:
        choose = getattr(quantization, "table_method", None)
        layer.method = choose(layer) if choose is not None else None


def held_bytes(module: nn.Module) -> int:
    """What the weights take as they are kept: every parameter, and what methods of linears keep beside them."""
    tensors: list[torch.Tensor] = list(module.parameters())
    for child in module.modules():
        if isinstance(child, Linear | Embedding):
            tensors += [buffer for buffer in child._buffers.values() if buffer is not None]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def fill(
    module: nn.Module,
    slots: Mapping[str, Slot],
    checkpoint: Checkpoint,
    report: Callable[[LoadProgress], None],
    ignored: Sequence[str] = (),
) -> None:
    """Read every slot's tensor, and finish each layer as soon as it is whole; `ignored` are patterns of other tensors."""
    wanted = _match_names(module, slots, checkpoint.infos(), ignored)
    total = sum(slot.num_bytes for slot in wanted.values()) or 1
    missing: dict[nn.Module, int] = {}
    for slot in wanted.values():
        missing[slot.module] = missing.get(slot.module, 0) + 1
    done, trimmed, whole = 0, 0, None
    with torch.inference_mode():
        for name, tensor, phase in checkpoint.tensors({name: slot.slot for name, slot in wanted.items()}):
            _finish(whole)  # not before the checkpoint has let go of the layer's last tensor: that is memory too
            slot = wanted[name]
            if not _is_shape(tuple(tensor.shape), slot.slot.shape):
                raise _wrong_shape(name, tuple(tensor.shape), slot.slot.shape)
            slot.slot.load(tensor.view(slot.slot.shape))
            del tensor
            missing[slot.module] -= 1
            whole = None if missing[slot.module] else slot.module
            done += slot.num_bytes
            report(LoadProgress(phase, done / total))
            if done - trimmed > total / _TRIMS:  # originals of quantized layers leave holes in the heap
                _trim_heap()
                trimmed = done
        _finish(whole)
    unfilled = [name for name, slot in wanted.items() if missing[slot.module]]
    if unfilled:
        raise ModelError(f"the checkpoint lacks {_some(unfilled)}")


def _finish(module: nn.Module | None) -> None:
    if isinstance(module, Layer):
        module.finish_weights()


def _match_names(
    module: nn.Module, slots: Mapping[str, Slot], infos: Mapping[str, TensorInfo] | None, ignored: Sequence[str]
) -> dict[str, Slot]:
    """Slots by their names in the checkpoint; every missing, extra or misshapen tensor is told at once."""
    if infos is None:
        return {name: slot for name, slot in slots.items() if not slot.slot.is_optional}
    arrange = getattr(module, "arrange_slots", None)  # a module that knows what the names of a checkpoint stand for
    if arrange is not None:
        given = {name: slot.slot for name, slot in slots.items()}
        wanted = {name: _slot(slot, slots[whole].module) for name, (whole, slot) in arrange(given, infos).items()}
    else:
        prefix, spellings = getattr(module, "weight_prefix", "model."), getattr(module, "weight_spellings", ())
        wanted = _spelled(slots, infos, prefix, spellings)
    wanted = {name: slot for name, slot in wanted.items() if name in infos or not slot.slot.is_optional}
    absent = [name for name in wanted if name not in infos]
    if absent:
        raise ModelError(f"the checkpoint lacks {_some(absent)}")
    extra = [name for name in infos if name not in wanted and not any(fnmatch(name, pattern) for pattern in ignored)]
    if extra:
        raise ModelError(f"the checkpoint holds {_some(extra)}, for which this architecture has no place")
    for name, slot in wanted.items():
        if not _is_shape(infos[name].shape, slot.slot.shape):
            raise _wrong_shape(name, infos[name].shape, slot.slot.shape, infos[name].file)
        if not _is_dtype(infos[name].dtype, slot.slot.dtype):
            raise _wrong_dtype(name, infos[name], str(slot.slot.dtype).removeprefix("torch."))
    return wanted


def _is_shape(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Equal, both a single number however it is written, or one dim where that may be of any length, (-1,)."""
    return found == shape or (found in ((), (1,)) and shape in ((), (1,))) or (shape == (-1,) and len(found) == 1)


def _is_dtype(found: str, kept: torch.dtype | None) -> bool:
    """Whether a cast keeps the meaning: among plain floats and among wide integers; all others are codes of bits."""
    name = str(kept).removeprefix("torch.")
    return kept is None or name == found or any({name, found} <= family for family in (_PLAIN_FLOATS, _WIDE_INTS))


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


def _wrong_dtype(name: str, info: TensorInfo, wanted: str) -> ModelError:
    return ModelError(
        f"tensor {name} in {info.file} is {info.dtype}, config.json asks for {wanted}: its quantization_config does not "
        "describe these weights"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors: {shown}{' …' if len(names) > 4 else ''}"
