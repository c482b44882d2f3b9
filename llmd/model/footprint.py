"""What a model will take and reach, reckoned from its config alone: weights, KV cache, what fits, and the roofline."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llmd.config import AdaptersConfig, CacheConfig, Config, ModelConfig, SchedulerConfig
from llmd.engine.roofline import likely_share, max_decode_rate
from llmd.errors import ModelError
from llmd.model.blueprint import Blueprint
from llmd.model.kv_tensors import block_bytes, kv_dtype, pool_bytes, promised_bytes
from llmd.model.layers import Embedding, Layer, Linear, LMHead
from llmd.model.loader import build_empty, plan_model
from llmd.model.memory_room import RESERVE_BYTES, HostMemory, check_room, host_memory
from llmd.model.parts import ModelParts
from llmd.model.states import room_beside, row_bytes
from llmd.model.weights import held_bytes, prepare_slots

log = logging.getLogger("llmd.model")

_WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin", "*.pt")
_MAX_GROWTH = 4  # of eight bits in a file that are kept as float32


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
    state_bytes: int  # of all rows, beside their blocks
    num_blocks: int
    num_tokens: int  # that the pool holds
    max_model_len: int
    num_sequences: int  # of the full length that fit
    weight_bits: float = 16.0  # of a linear's weight, scales included
    bandwidth: float | None = None  # bytes a second

    @property
    def max_decode_rate(self) -> float | None:
        """Tokens a second of one sequence, if reading the weights were all there is to do."""
        return self.bandwidth / self.step_bytes if self.bandwidth else None

    @property
    def decode_limit(self) -> float | None:
        """The same with the KV of a context of `roofline.CONTEXT` tokens."""
        if not self.bandwidth or not self.kv_bytes_per_token:
            return None
        return max_decode_rate(self.bandwidth, self.step_bytes, self.kv_bytes_per_token)

    @property
    def likely_decode_rate(self) -> float | None:
        """What of it is likely reached on a CPU: an estimate by the bits of a weight."""
        limit = self.decode_limit if self.device == "cpu" else None
        return None if limit is None else limit * likely_share(self.weight_bits)


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
    largest = max((slot.num_bytes for slot in prepare_slots(module, quantization).values()), default=0)
    weights = _weights_bytes(module)
    adapters = _adapter_bytes(module, config.adapters, blueprint.dtype)
    activations = _activation_bytes(config.scheduler, blueprint)
    per_block = _block_bytes(cache, blueprint)
    states = row_bytes(blueprint.states) * config.scheduler.max_num_seqs
    if blueprint.device.type == "cpu":
        needs = _host_needs(cache, weights, adapters, max(activations, largest), per_block, states)
        check_room(shape.architectures[0], needs, host_memory(), promised_bytes())
    room = 0
    if per_block or states:
        room = _pool(config, blueprint.device, device_bytes, weights + adapters + activations)
        room = room_beside(room, blueprint.states, config.scheduler.max_num_seqs)
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
        step_bytes=step_bytes(module),
        adapter_bytes=adapters,
        activation_bytes=activations,
        device_bytes=device_bytes,
        kv_bytes_per_token=-(-per_block // cache.block_size),
        pool_bytes=room if per_block else 0,
        state_bytes=states,
        num_blocks=num_blocks,
        num_tokens=num_tokens,
        max_model_len=length,
        num_sequences=min(num_tokens // length, config.scheduler.max_num_seqs) if length else 0,
        weight_bits=weight_bits(module),
    )


def reserve_host(
    model: ModelConfig, cache: CacheConfig, scheduler: SchedulerConfig, path: Path, parts: ModelParts, blueprint: Blueprint
) -> int:
    """Bytes that a model on the CPU will take beside its KV pool, before any is taken; ModelError where they do not fit.

    Where even a loose bound by the files' size fits, that is told: building the model to reckon it takes part of the start.
    """
    memory, promised = host_memory(), promised_bytes()
    has_adapters = parts.adapters is not None and parts.adapters.enable_lora
    if (files := _file_bytes(model, path)) and not has_adapters:
        bound = _MAX_GROWTH * files + _activation_bytes(scheduler, blueprint) + RESERVE_BYTES
        pool = cache.kv_cache_bytes if cache.kv_cache_bytes is not None else memory.free_bytes // 4
        if bound + max(pool, row_bytes(blueprint.states) * scheduler.max_num_seqs) <= memory.free_bytes - promised:
            return bound
    return _reserve_exactly(model, cache, scheduler, parts, blueprint, memory)


def _reserve_exactly(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    parts: ModelParts,
    blueprint: Blueprint,
    memory: HostMemory,
) -> int:
    module, quantization, _ = build_empty(model, parts, blueprint, max_model_len=1, device=torch.device("meta"))
    largest = max((slot.num_bytes for slot in prepare_slots(module, quantization).values()), default=0)
    weights = held_bytes(module) if quantization is None else _weights_bytes(module)
    adapters = _adapter_bytes(module, parts.adapters, blueprint.dtype)
    working = max(_activation_bytes(scheduler, blueprint), largest)
    states = row_bytes(blueprint.states) * scheduler.max_num_seqs
    needs = _host_needs(cache, weights, adapters, working, _block_bytes(cache, blueprint), states)
    check_room(blueprint.config.architectures[0], needs, memory, promised_bytes())
    return weights + adapters + working + RESERVE_BYTES


def _host_needs(
    cache: CacheConfig, weights: int, adapters: int, working: int, per_block: int, states: int
) -> dict[str, int]:
    """What a model takes of host memory, in the words that it is told in; of a pool without a size, a block at least."""
    pool = max(states + per_block, cache.kv_cache_bytes or 0) if per_block or states else 0
    return {"weights": weights, "adapter slots": adapters, "KV pool": pool, "working memory": working}


def _file_bytes(model: ModelConfig, path: Path) -> int:
    """Of a checkpoint's files; 0 where there are none, or they are not read."""
    if model.load_format == "dummy":
        return 0
    files = [path] if path.is_file() else [file for pattern in _WEIGHT_FILES for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)


def _block_bytes(cache: CacheConfig, blueprint: Blueprint) -> int:
    """Of a KV block of all layers; an encoder has none."""
    shape = blueprint.config
    if blueprint.is_encoder:
        return 0
    kv_shape = blueprint.backend.kv_shape(cache.block_size, shape.num_kv_heads, shape.head_dim)
    return block_bytes(blueprint.num_kv_layers, kv_shape, kv_dtype(cache.kv_cache_dtype, blueprint.dtype))


def step_bytes(module: nn.Module) -> int:
    """Weights that a decode step reads."""
    return held_bytes(module) - _idle_bytes(module)


def weight_bits(module: nn.Module) -> float:
    """Mean bits of a weight of the linears, scales included; 16 where there are none."""
    linears = [child for child in module.modules() if isinstance(child, Linear)]
    count = sum(layer.in_features * layer.out_features for layer in linears)
    return 8 * sum(held_bytes(layer) for layer in linears) / count if count else 16.0


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


def _adapter_bytes(module: nn.Module, wanted: AdaptersConfig | None, dtype: torch.dtype) -> int:
    """Slots beside every linear: A [slots, rank · parts, in] and B [slots, out, rank]."""
    if wanted is None or not wanted.enable_lora:
        return 0
    sizes = (
        layer.in_features * len(layer.parts) + layer.out_features for layer in module.modules() if isinstance(layer, Linear)
    )
    return wanted.max_loras * wanted.max_lora_rank * sum(sizes) * dtype.itemsize


def _activation_bytes(scheduler: SchedulerConfig, blueprint: Blueprint) -> int:
    """The largest step's: a layer's widest tensors for every token, and float32 logits for every row, twice."""
    shape = blueprint.config
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
