"""What a model will take and reach, reckoned from its config alone: weights, KV cache, what fits, and the roofline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmd.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from llmd.engine.roofline import CONTEXT, likely_share, max_decode_rate
from llmd.model.blueprint import Blueprint
from llmd.model.cuda_graphs import sizes_of
from llmd.model.device_memory import device_memory
from llmd.model.estimates import CONTEXT_BYTES, OUTSIDE_BYTES, activation_bytes, graph_bytes
from llmd.model.kv_tensors import block_bytes, host_pool_bytes, kv_dtype, promised_bytes
from llmd.model.loader import build_empty, plan_model
from llmd.model.memory_account import MemoryAccount, memory_notes
from llmd.model.memory_room import RESERVE_BYTES, HostMemory, check_room, host_memory, show
from llmd.model.parts import ModelParts
from llmd.model.states import room_beside, row_bytes
from llmd.model.weight_sizes import adapter_bytes, token_bytes, weights_bytes
from llmd.model.weight_sizes import step_bytes as step_bytes
from llmd.model.weight_sizes import weight_bits as weight_bits
from llmd.model.weights import held_bytes, prepare_slots

_WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin", "*.pt")
_MAX_GROWTH = 4  # of eight bits in a file that are kept as float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint(MemoryAccount):
    """A model's memory and rates. What is None does not apply or is not known."""

    model: str
    architecture: str
    dtype: str
    quantization: str | None
    attention_backend: str
    step_bytes: int  # weights that a decode step of many rows reads: all but the rows of the embedding that nobody asked for
    token_bytes: int = 0  # those of a step of one row: of a mixture only the experts that it chose
    weight_bits: float = 16.0  # of a linear's weight, scales included
    graph_sizes: tuple[int, ...] = ()  # rows of each decode graph
    bandwidth: float | None = None  # bytes a second
    suggestions: tuple[str, ...] = ()  # what would fit, where this does not

    @property
    def max_decode_rate(self) -> float | None:
        """Tokens a second of one sequence, if reading the weights were all there is to do."""
        return self.bandwidth / self.token_bytes if self.bandwidth else None

    @property
    def decode_limit(self) -> float | None:
        """The same with the KV of a context of `roofline.CONTEXT` tokens."""
        if not self.bandwidth or not self.kv_bytes_per_token:
            return None
        return max_decode_rate(self.bandwidth, self.token_bytes, self.kv_bytes_per_token)

    @property
    def batch_decode_limit(self) -> float | None:
        """Tokens a second of all sequences, as many as run at once with such a context."""
        if not self.bandwidth or not (num_rows := self.num_batch_rows):
            return None
        return num_rows * self.bandwidth / (self.step_bytes + num_rows * CONTEXT * self.kv_bytes_per_token)

    @property
    def num_batch_rows(self) -> int:
        """Sequences with such a context that run at once."""
        return min(self.max_num_seqs, self.num_tokens // CONTEXT)

    @property
    def likely_decode_rate(self) -> float | None:
        """What of it is likely reached on a CPU: an estimate by the bits of a weight."""
        limit = self.decode_limit if self.device == "cpu" else None
        return None if limit is None else limit * likely_share(self.weight_bits)


def reckon(
    config: Config,
    model: ModelConfig,
    path: Path,
    parts: ModelParts,
    *,
    device_bytes: int | None = None,
    others_bytes: int = 0,
) -> Footprint:
    """Reckon with `device_bytes` of a GPU that need not be here, of which neighbours have some, or with this machine.

    What a GPU lacks is told by `missing_bytes`. Raises ModelError for a model that does not fit this machine, or that cannot
    be served at all.
    """
    cache = config.cache
    device = torch.device("cuda") if device_bytes is not None else None
    blueprint = plan_model(
        model, path, parts, block_size=cache.block_size, kv_cache_dtype=cache.kv_cache_dtype, device=device
    )
    if blueprint.device.type == "cpu":
        footprint, working = _of_model(config, model, parts, blueprint)
        return _on_host(config, model, blueprint, footprint, working)
    if device_bytes is None:
        free, device_bytes = torch.cuda.mem_get_info(blueprint.device)
        others_bytes += max(0, device_bytes - free - CONTEXT_BYTES)  # the context is there already: it is counted below
    footprint, _ = _of_model(config, model, parts, blueprint)
    return _on_gpu(config, model, blueprint, footprint, device_bytes, others_bytes)


def _of_model(config: Config, model: ModelConfig, parts: ModelParts, blueprint: Blueprint) -> tuple[Footprint, int]:
    """What does not depend on the device's size, and the working memory, of a step or of the largest layer as it loads."""
    shape, scheduler = blueprint.config, config.scheduler
    wanted = model.max_model_len or shape.context_length
    meta = torch.device("meta")
    module, quantization, name = build_empty(model, parts, blueprint, max_model_len=wanted, device=meta)
    largest = max((slot.num_bytes for slot in prepare_slots(module, quantization).values()), default=0)
    activations = activation_bytes(scheduler, blueprint)
    footprint = Footprint(
        model=model.model,
        architecture=shape.architectures[0],
        device=str(blueprint.device),
        dtype=str(blueprint.dtype).removeprefix("torch."),
        quantization=name,
        attention_backend=blueprint.backend_name,
        weights_bytes=weights_bytes(module),
        adapter_bytes=adapter_bytes(module, parts.adapters, blueprint.dtype),
        activation_bytes=activations,
        state_bytes=row_bytes(blueprint.states) * scheduler.max_num_seqs,
        block_bytes=_block_bytes(config.cache, blueprint),
        block_size=config.cache.block_size,
        max_model_len=wanted,
        max_num_seqs=scheduler.max_num_seqs,
        step_bytes=step_bytes(module),
        token_bytes=token_bytes(module, shape),
        weight_bits=weight_bits(module),
    )
    return footprint, max(activations, largest)


def _on_host(config: Config, model: ModelConfig, blueprint: Blueprint, footprint: Footprint, working: int) -> Footprint:
    """With this machine's memory. Raises ModelError where it is not enough."""
    cache, memory, of = config.cache, host_memory(), footprint
    needs = _host_needs(cache, of.weights_bytes, of.adapter_bytes, working, of.block_bytes, of.state_bytes)
    check_room(of.architecture, needs, memory, promised_bytes())
    room = 0
    if of.block_bytes or of.state_bytes:
        room = host_pool_bytes(cache, of.weights_bytes + of.adapter_bytes + of.activation_bytes)
        room = room_beside(room, blueprint.states, of.max_num_seqs)
    total = max(memory.total_bytes, memory.free_bytes)
    placed = replace(
        footprint,
        device_bytes=total,
        others_bytes=total - memory.free_bytes,
        reserve_bytes=RESERVE_BYTES,
        notes=memory_notes(cache, config.scheduler, is_gpu=False, is_measured=False),
    )
    return _with_pool(placed, room, model)


def _on_gpu(
    config: Config, model: ModelConfig, blueprint: Blueprint, footprint: Footprint, device_bytes: int, others_bytes: int
) -> Footprint:
    """With a device of that size, here or not. It may be too small."""
    cache = config.cache
    has_graphs = not blueprint.is_encoder and not model.enforce_eager
    sizes = sizes_of(config.scheduler.max_num_seqs) if has_graphs else ()
    notes = memory_notes(cache, config.scheduler, is_gpu=True, is_measured=False)
    if sizes:
        notes["graphs"] = f"estimated: decode steps of {len(sizes)} sizes, to {sizes[-1]} rows"
    placed = replace(
        footprint,
        device_bytes=device_bytes,
        others_bytes=others_bytes + CONTEXT_BYTES,
        limit_bytes=None if cache.kv_cache_bytes is not None else int(device_bytes * cache.gpu_memory_utilization),
        graph_bytes=graph_bytes(sizes, blueprint),
        graph_sizes=sizes,
        outside_bytes=OUTSIDE_BYTES,
        reserve_bytes=device_bytes // 100,
        notes=notes,
    )
    room = placed.room_bytes
    if cache.kv_cache_bytes is None:
        notes["KV pool"] = placed.bound
    else:
        room = room_beside(cache.kv_cache_bytes, blueprint.states, config.scheduler.max_num_seqs)
    return _with_pool(placed, room, model)


def _with_pool(footprint: Footprint, room: int, model: ModelConfig) -> Footprint:
    """The blocks that fit, and the context: one that was not asked for may be shorter than the model's own."""
    if not footprint.block_bytes:
        return footprint
    num_blocks = max(room, 0) // footprint.block_bytes
    length = footprint.max_model_len
    if model.max_model_len is None and num_blocks:
        length = min(length, num_blocks * footprint.block_size)
    return replace(footprint, num_blocks=num_blocks, max_model_len=length)


def reserve_memory(
    model: ModelConfig, cache: CacheConfig, scheduler: SchedulerConfig, path: Path, parts: ModelParts, blueprint: Blueprint
) -> int:
    """Bytes that a model will take beside its KV pool, before any is taken. Raises ModelError where they do not fit.

    Where even a loose bound by the files' size fits, that is told: building the model to reckon it takes part of the start.
    """
    is_gpu = blueprint.device.type == "cuda"
    memory, promised = (_gpu_memory(blueprint.device), 0) if is_gpu else (host_memory(), promised_bytes())
    has_adapters = parts.adapters is not None and parts.adapters.enable_lora
    if (files := _file_bytes(model, path)) and not has_adapters:
        growth = 1 if is_gpu else _MAX_GROWTH  # a GPU has what a file has, or what fewer bits leave of it
        bound = growth * files + activation_bytes(scheduler, blueprint) + RESERVE_BYTES
        pool = cache.kv_cache_bytes if cache.kv_cache_bytes is not None else memory.free_bytes // 4
        if bound + max(pool, row_bytes(blueprint.states) * scheduler.max_num_seqs) <= memory.free_bytes - promised:
            return bound
    return _reserve_exactly(model, cache, scheduler, parts, blueprint, memory, promised)


def _reserve_exactly(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    parts: ModelParts,
    blueprint: Blueprint,
    memory: HostMemory,
    promised: int,
) -> int:
    module, quantization, _ = build_empty(model, parts, blueprint, max_model_len=1, device=torch.device("meta"))
    largest = max((slot.num_bytes for slot in prepare_slots(module, quantization).values()), default=0)
    weights = held_bytes(module) if quantization is None else weights_bytes(module)
    adapters = adapter_bytes(module, parts.adapters, blueprint.dtype)
    working = max(activation_bytes(scheduler, blueprint), largest)
    states = row_bytes(blueprint.states) * scheduler.max_num_seqs
    needs = _host_needs(cache, weights, adapters, working, _block_bytes(cache, blueprint), states)
    check_room(blueprint.config.architectures[0], needs, memory, promised)
    return weights + adapters + working + RESERVE_BYTES


def _gpu_memory(device: torch.device) -> HostMemory:
    now = device_memory(device)
    why = f"of {show(now.total_bytes)}, others have {show(now.outside_bytes + now.allocated_bytes)}"
    return HostMemory(now.free_bytes + now.reserved_bytes - now.allocated_bytes, why, now.total_bytes, str(device))


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
