"""From files to a module with weights: built without memory, each tensor read, cast and placed one at a time.

    config.json ─► ArchitectureConfig ─► architecture.build(config, layers) on the meta device
    checkpoint  ─► tensor by tensor ─► the slot of that name ─► the layer's memory, cast on the way (to a GPU: device_stream)
                   the last tensor of a layer ─► layer.finish_weights() (repack, quantize), the original freed

So the peak is the weights and what one shard needs, whatever the number of shards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmd.config import ModelConfig
from llmd.engine.executor import LoadProgress
from llmd.errors import ModelError
from llmd.model import kernels_ahead
from llmd.model.adapter_merging import merge
from llmd.model.attention import AttentionBackend
from llmd.model.blueprint import Blueprint, build_module
from llmd.model.blueprint import plan_model as plan_model
from llmd.model.blueprint import select_device as select_device
from llmd.model.config import ArchitectureConfig
from llmd.model.device_stream import DeviceStream, can_stream
from llmd.model.layers import Layer, Layers, Shard
from llmd.model.parts import ModelParts as ModelParts
from llmd.model.prepacked import Prepacked
from llmd.model.prepacked_files import entry_of, weight_files
from llmd.model.quantization import Quantization
from llmd.model.quantization_choice import candidates, unreadable
from llmd.model.states import StateShape
from llmd.model.weights import Checkpoint, fill, give_memory, held_bytes, prepare_slots, trim_heap

log = logging.getLogger("llmd.model")

# Static scales of KV caches and attention, as llm-compressor, AutoFP8 and ModelOpt save them: what a cache in eight bits
# needs it takes from each token (see llmd_kernels.quantized_kv), and attention computes in floats.
_KV_SCALES = ("*.k_scale", "*.v_scale", "*.kv_scale", "*.q_scale", "*.prob_scale", "*.prob_output_scale", "*.k_zero_point",
              "*.v_zero_point", "*_proj.output_scale")  # fmt: skip


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
    num_kv_layers: int = 0
    states: tuple[StateShape, ...] = ()


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
    memory = give_memory(module) if blueprint.device.type == "cpu" else None
    layers = {slot.module.name: slot.module for slot in slots.values() if isinstance(slot.module, Layer)}
    prepacked = open_prepacked(model, path, parts, checkpoint, shard, layers) if memory is not None else None
    try:
        restored = prepacked.restore(memory, report) if prepacked is not None and memory is not None else set()
        with _way_to(blueprint.device, model) as stream:
            fill(module, slots, checkpoint, report, ignored, memory=memory, whole=restored, stream=stream)
        if prepacked is not None:
            prepacked.save()
    finally:
        checkpoint.close()
        if memory is not None:
            memory.close()
        trim_heap()
    if blueprint.device.type == "cuda":
        kernels_ahead.wait()  # what comes next launches them
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
        num_kv_layers=blueprint.num_kv_layers,
        states=blueprint.states,
    )


def _way_to(device: torch.device, model: ModelConfig) -> AbstractContextManager[DeviceStream | None]:
    """Weights are streamed to a GPU, unless an adapter changes them on the host."""
    return DeviceStream(device) if can_stream(device) and model.merge_adapter is None else nullcontext()


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
        module = build_module(model, config, parts, layers)
    if tuple(layers.states) != blueprint.states:
        raise ModelError(
            f"architecture {config.architectures[0]} keeps states that were not reckoned with: its spec must say "
            "has_state=True, and what it keeps may depend on the config only"
        )
    return module.requires_grad_(False).eval(), quantization, name


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


def open_prepacked(
    model: ModelConfig,
    path: Path,
    parts: ModelParts,
    checkpoint: Checkpoint,
    shard: Shard | None,
    layers: Mapping[str, Layer],
) -> Prepacked | None:
    """What is kept of this model, or will be; None for one that is not read from files, or whose cache is off."""
    infos, known = checkpoint.infos(), {file.name for file in weight_files(path)}
    if infos is None or not {info.file for info in infos.values()} <= known:
        return None
    shard = shard or Shard()
    entry = entry_of(model, path, parts, shard.rank, shard.world)
    return None if entry is None else Prepacked(entry, model.prepacked_cache_bytes, layers)
