"""What a model will take and reach, reckoned from its config alone: weights, KV cache, what fits, and the roofline."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llmd.config import Config, ModelConfig
from llmd.errors import ModelError
from llmd.model.kv_tensors import block_bytes, kv_dtype, pool_bytes
from llmd.model.layers import Embedding, Layer, Linear, LMHead
from llmd.model.loader import Blueprint, build_empty, held_bytes, plan_model, prepare_slots
from llmd.model.parts import ModelParts

log = logging.getLogger("llmd.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes and tokens of one model on one device. What is None does not apply or is not known."""

    model: str
    architecture: str
    device: str
    dtype: str
    quantization: str | None
    attention_backend: str
    weights_bytes: int
    step_bytes: int  # weights that a decode step reads: all but the rows of the embedding that nobody asked for
    adapter_bytes: int
    activation_bytes: int  # of the largest step; an estimate
    device_bytes: int | None
    kv_bytes_per_token: int
    pool_bytes: int
    num_blocks: int
    num_tokens: int  # that the pool holds
    max_model_len: int
    num_sequences: int  # of the full length that fit
    bandwidth: float | None = None  # bytes a second

    @property
    def max_decode_rate(self) -> float | None:
        """Tokens a second of one sequence, if reading the weights were all there is to do."""
        return self.bandwidth / self.step_bytes if self.bandwidth else None


def reckon(
    config: Config, model: ModelConfig, path: Path, parts: ModelParts, *, device_bytes: int | None = None
) -> Footprint:
    """Reckon with `device_bytes` of a GPU that need not be here, or with this machine. Raises ModelError if nothing fits."""
    cache = config.cache
    device = torch.device("cuda") if device_bytes is not None else None
    blueprint = plan_model(
        model, path, parts, block_size=cache.block_size, kv_cache_dtype=cache.kv_cache_dtype, device=device
    )
    shape = blueprint.config
    wanted = model.max_model_len or shape.context_length
    module, quantization, quantization_name = build_empty(
        model, parts, blueprint, max_model_len=wanted, device=torch.device("meta")
    )
    prepare_slots(module, quantization)
    weights = _weights_bytes(module)
    adapters = _adapter_bytes(module, config, blueprint.dtype)
    activations = _activation_bytes(config, blueprint)
    per_block = 0
    if not blueprint.is_encoder:
        kv_shape = blueprint.backend.kv_shape(cache.block_size, shape.num_kv_heads, shape.head_dim)
        per_block = block_bytes(shape.num_layers, kv_shape, kv_dtype(cache.kv_cache_dtype, blueprint.dtype))
    room = _pool(config, blueprint.device, device_bytes, weights + adapters + activations) if per_block else 0
    num_blocks = room // per_block if per_block else 0
    num_tokens = num_blocks * cache.block_size
    length = min(wanted, num_tokens) if per_block and model.max_model_len is None else wanted
    return Footprint(
        model=model.model,
        architecture=shape.architectures[0],
        device=str(blueprint.device),
        dtype=str(blueprint.dtype).removeprefix("torch."),
        quantization=quantization_name,
        attention_backend=blueprint.backend_name,
        weights_bytes=weights,
        step_bytes=weights - _idle_bytes(module),
        adapter_bytes=adapters,
        activation_bytes=activations,
        device_bytes=device_bytes,
        kv_bytes_per_token=-(-per_block // cache.block_size),
        pool_bytes=room,
        num_blocks=num_blocks,
        num_tokens=num_tokens,
        max_model_len=length,
        num_sequences=min(num_tokens // length, config.scheduler.max_num_seqs) if length else 0,
    )


def _weights_bytes(module: nn.Module) -> int:
    """As they are kept: every layer is finished without memory; where that cannot be, as the checkpoint has them."""
    before = held_bytes(module)
    try:
        with torch.inference_mode(), _ChecksPass():
            for layer in module.modules():
                if isinstance(layer, Layer):
                    layer.finish_weights()
    except (RuntimeError, NotImplementedError, ModelError) as error:  # it looks at values, which are not there
        log.debug("the weights are reckoned as the checkpoint has them", exc_info=error)
        return before
    return held_bytes(module)


class _ChecksPass(TorchFunctionMode):
    """Questions about all values of a tensor without memory are answered as for good weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answers = {"all": True, "any": False, "max": 1.0}
        if getattr(func, "__name__", "") in answers and len(args) == 1 and args[0].is_meta and not kwargs:
            return torch.tensor(answers[func.__name__])
        return func(*args, **(kwargs or {}))


def _idle_bytes(module: nn.Module) -> int:
    """The embedding's table, of which a step reads a few rows, unless the head reads all of it."""
    is_tied = any(isinstance(child, LMHead) and child.is_tied for child in module.modules())
    return 0 if is_tied else sum(held_bytes(child) for child in module.modules() if isinstance(child, Embedding))


def _adapter_bytes(module: nn.Module, config: Config, dtype: torch.dtype) -> int:
    """Slots beside every linear: A [slots, rank · parts, in] and B [slots, out, rank]."""
    wanted = config.adapters
    if not wanted.enable_lora:
        return 0
    sizes = (
        layer.in_features * len(layer.parts) + layer.out_features for layer in module.modules() if isinstance(layer, Linear)
    )
    return wanted.max_loras * wanted.max_lora_rank * sum(sizes) * dtype.itemsize


def _activation_bytes(config: Config, blueprint: Blueprint) -> int:
    """The largest step's: a layer's widest tensors for every token, and float32 logits for every row, twice."""
    shape, scheduler = blueprint.config, config.scheduler
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    per_token = (4 * shape.hidden_size + qkv + 3 * shape.intermediate_size) * blueprint.dtype.itemsize
    return scheduler.max_num_batched_tokens * per_token + 2 * scheduler.max_num_seqs * shape.vocab_size * 4


def _pool(config: Config, device: torch.device, device_bytes: int | None, used: int) -> int:
    """What is left for the KV pool. Raises ModelError, with the arithmetic, when that is nothing."""
    cache = config.cache
    if device_bytes is None or cache.kv_cache_bytes is not None:
        return pool_bytes(cache, device, used)
    room = int(device_bytes * cache.gpu_memory_utilization) - used
    if room <= 0:
        raise ModelError(
            f"{device_bytes:,} bytes x gpu_memory_utilization {cache.gpu_memory_utilization} are less than the {used:,} "
            "that weights, adapters and activations take"
        )
    return room
