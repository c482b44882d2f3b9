"""What would fit where a model does not: the configuration is changed in one way after the other, and reckoned again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llmd.config import Config, ModelConfig
from llmd.errors import ModelError
from llmd.model.footprint import Footprint, reckon
from llmd.model.memory_room import show
from llmd.model.parts import ModelParts

_SMALL_STEP = {"max_num_batched_tokens": 2048, "max_num_seqs": 64}
_USUAL_SHARE, _FULL_SHARE = 0.9, 0.95


class _Change(NamedTuple):
    """A configuration beside the one that was asked for."""

    words: str
    config: Config
    model: ModelConfig
    others_bytes: int


def suggestions(
    config: Config, model: ModelConfig, path: Path, parts: ModelParts, lacking: Footprint, *, others_bytes: int
) -> list[str]:
    """Changes that let a model fit its GPU, and what each gives; for a lone model, how large a device would do as it is."""
    lines = []
    if not lacking.missing_bytes and lacking.num_tokens:
        lines.append(f"max_model_len = {lacking.num_tokens}")
    for words, changed, changed_model, beside in _changes(config, model, parts, lacking.device_bytes or 0, others_bytes):
        try:
            found = reckon(changed, changed_model, path, parts, device_bytes=lacking.device_bytes, others_bytes=beside)
        except ModelError:  # the model cannot be served in that way
            continue
        if not found.missing_bytes and (found.num_tokens >= (model.max_model_len or 1) or not found.block_bytes):
            lines.append(f"{words}: {_gives(found)}")
    return lines if len(config.models) > 1 else [*lines, _larger_device(config, lacking)]


def _changes(
    config: Config, model: ModelConfig, parts: ModelParts, device_bytes: int, others_bytes: int
) -> Iterator[_Change]:
    """From the one that changes least."""
    cache = config.cache
    if others_bytes and cache.kv_cache_bytes is None:
        num_models = len(config.models)
        share = int(100 * _USUAL_SHARE / num_models) / 100
        words = f"cache.gpu_memory_utilization = {share}, of each of {num_models} models"
        beside = int((num_models - 1) * share * device_bytes)
        yield _Change(words, _with(config, "cache", gpu_memory_utilization=share), model, beside)
    if cache.kv_cache_bytes is None and cache.gpu_memory_utilization < _FULL_SHARE:
        words = f"cache.gpu_memory_utilization = {_FULL_SHARE}"
        yield _Change(words, _with(config, "cache", gpu_memory_utilization=_FULL_SHARE), model, others_bytes)
    if cache.kv_cache_bytes is not None:
        yield _Change("no cache.kv_cache_bytes", _with(config, "cache", kv_cache_bytes=None), model, others_bytes)
    smaller = {name: size for name, size in _SMALL_STEP.items() if size < getattr(config.scheduler, name)}
    if smaller:
        words = ", ".join(f"scheduler.{name} = {size}" for name, size in smaller.items())
        yield _Change(words, _with(config, "scheduler", **smaller), model, others_bytes)
    eighths = _with(config, "cache", kv_cache_dtype="fp8") if cache.kv_cache_dtype == "auto" else None
    if eighths is not None:
        yield _Change('cache.kv_cache_dtype = "fp8"', eighths, model, others_bytes)
    if model.quantization is not None:
        return
    for name in ("int8", "int4"):
        if name in parts.quantizations:
            fewer_bits = model.model_copy(update={"quantization": name})
            yield _Change(f'quantization = "{name}"', config, fewer_bits, others_bytes)
    if eighths is not None and "int4" in parts.quantizations:
        yield _Change('quantization = "int4", cache.kv_cache_dtype = "fp8"', eighths, fewer_bits, others_bytes)


def _with(config: Config, section: str, **changes: Any) -> Config:
    changed = getattr(config, section).model_copy(update=changes)
    return config.model_copy(update={section: changed})


def _gives(found: Footprint) -> str:
    """What comes of a change."""
    return (
        f"weights {show(found.weights_bytes)}, KV pool {show(found.pool_bytes)}, {found.num_tokens:,} tokens, "
        f"{found.num_sequences:,} sequences of {found.max_model_len:,}"
    )


def _larger_device(config: Config, lacking: Footprint) -> str:
    """How much memory would do, for one sequence of the full length."""
    blocks = -(-lacking.max_model_len // lacking.block_size)
    needed = lacking.taken_bytes - lacking.pool_bytes + blocks * lacking.block_bytes
    total = (needed + lacking.others_bytes) * 100 // 99
    if config.cache.kv_cache_bytes is None:
        total = max(total, int(needed / config.cache.gpu_memory_utilization))
    return f"a device of {show(total)}: as it is, for one sequence of {lacking.max_model_len:,}"
