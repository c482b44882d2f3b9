"""All decisions about a model that need no weights: its config, device, dtype, attention backend, and what rows keep."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from llmd.config import ModelConfig
from llmd.errors import ModelError
from llmd.model.architectures import select_architecture, spell_config
from llmd.model.attention import AttentionBackend, AttentionNeeds, select_backend
from llmd.model.config import ArchitectureConfig, read_config
from llmd.model.layers import Layers
from llmd.model.parts import ModelParts
from llmd.model.states import StateShape
from llmd.model.torch_import import finish_import

log = logging.getLogger("llmd.model")

_DTYPES = {
    "half": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32,
    "float32": torch.float32,
}  # fmt: skip


class Blueprint(NamedTuple):
    """All decisions that need no weights."""

    config: ArchitectureConfig
    dtype: torch.dtype
    device: torch.device
    backend: AttentionBackend
    backend_name: str
    is_encoder: bool = False
    num_kv_layers: int = 0  # of the KV pool; a hybrid has fewer than layers, an encoder none
    states: tuple[StateShape, ...] = ()  # that each row keeps beside it


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
    blueprint = Blueprint(config, dtype, device, backend, name, encodes, 0 if encodes else config.num_layers)
    if not getattr(select_architecture(config.raw, parts.architectures, model.model_impl).spec, "has_state", False):
        return blueprint
    return _with_states(model, parts, blueprint)


def _with_states(model: ModelConfig, parts: ModelParts, blueprint: Blueprint) -> Blueprint:
    """What the layers will keep, asked of a model that is built without memory."""
    if blueprint.is_encoder:
        raise ModelError("an encoder keeps nothing between steps: its spec cannot say both is_encoder and has_state")
    layers = Layers(blueprint.config, blueprint.backend, dtype=blueprint.dtype, device=torch.device("meta"), max_model_len=1)
    with torch.device("meta"):
        build_module(model, blueprint.config, parts, layers)
    return blueprint._replace(num_kv_layers=len(layers.kv_layers), states=tuple(layers.states))


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


def build_module(model: ModelConfig, config: ArchitectureConfig, parts: ModelParts, layers: Layers) -> nn.Module:
    choice = select_architecture(config.raw, parts.architectures, model.model_impl)
    if choice.is_fallback:
        names = " / ".join(config.architectures)
        log.warning("%s runs through Transformers' code, which is slower than an architecture of llmd's own", names)
    assert choice.spec is not None
    module: nn.Module
    try:
        module = choice.spec.build(config, layers)
    except NotImplementedError:  # of an operator that torch can run on the meta device only once all of it is imported
        if not finish_import():
            raise
        module = choice.spec.build(config, layers)
    return module


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
            raise ModelError(f"device {name!r} is not there: this machine has {count} GPUs")
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
