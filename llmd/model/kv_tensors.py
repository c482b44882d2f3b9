"""The KV pool: one tensor [block, layer, k/v, token, head, dim], so that a block moves to host, disk or peer in one copy.

Layers see it through strided views [block, k/v, token, head, dim]. In eight bits the pool is bytes, in which each layer's
keys and values of a block are followed by their scales (see llmd_kernels.quantized_kv), and layers see a QuantizedKV.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmd.config import CacheConfig
from llmd.engine.step import BlockCopy
from llmd.errors import ModelError
from llmd.model.batch import zeros
from llmd.model.device_memory import device_memory, give_back
from llmd.model.memory_room import free_memory
from llmd.model.memory_room import show as show
from llmd.model.out_of_memory import is_out_of_memory
from llmd.model.staging import send
from llmd_kernels.copy_blocks import copy_blocks
from llmd_kernels.quantized_kv import LIMITS, LayerKV, half_bytes, view_quantized

log = logging.getLogger("llmd.model")

_CPU_DEFAULT_MAX_BYTES = 4 << 30
_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip


_host_pools: weakref.WeakSet[KVTensors] = weakref.WeakSet()


class KVTensors:
    """Owns the pool; it can be given back (sleep) and taken again (wake) without a new process."""

    def __init__(
        self, num_blocks: int, num_layers: int, kv_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.dtype = dtype
        self.device = device
        self._kv_shape = kv_shape
        self._shape = (num_blocks, num_layers, *kv_shape)
        if self.is_quantized:
            self._shape = (num_blocks, num_layers, 2, half_bytes(kv_shape))
        self.layers: tuple[LayerKV, ...] = ()
        self.pool: Tensor | None = None
        self.refill()
        if device.type == "cpu":
            _host_pools.add(self)

    @property
    def is_quantized(self) -> bool:
        """Whether numbers have eight bits and scales."""
        return self.dtype in LIMITS and len(self._kv_shape) > 0

    @property
    def num_bytes(self) -> int:
        """Size of the whole pool."""
        return math.prod(self._shape) * self.dtype.itemsize

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, behind what is queued and before what comes; waits for nothing."""
        if copies and self.pool is not None:
            sources, targets = send(np.asarray(copies, dtype=np.int64).T, self.device)
            copy_blocks(self.pool, sources, targets)

    def release(self) -> None:
        """Give the memory back, to neighbours on the device too; what was cached is lost."""
        self.pool, self.layers = None, ()
        give_back(self.device)

    def refill(self) -> None:
        """Take the memory (again), empty. Raises NoRoom where it is not there; then it may be tried again."""
        if self.pool is not None:
            self.release()
        try:
            self.pool = zeros(self._shape, torch.uint8 if self.is_quantized else self.dtype, self.device)
        except Exception as error:  # only lack of memory has an answer here
            if not is_out_of_memory(error):
                raise
            raise NoRoom(f"{self.device} has no {show(self.num_bytes)} for the KV pool: {_free_now(self.device)}") from error
        self.layers = tuple(self.pool.unbind(1))
        if self.is_quantized:
            self.layers = tuple(view_quantized(layer, self._kv_shape, self.dtype) for layer in self.pool.unbind(1))


def _free_now(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{show(free_memory())} are free"
    now = device_memory(device)
    return f"{show(now.free_bytes)} of {show(now.total_bytes)} are free, {show(now.outside_bytes)} are others'"


class NoRoom(ModelError):
    """The device has no memory for the KV pool, as much as there should be."""


class Sizes(NamedTuple):
    """How large the pool and the context are."""

    num_blocks: int
    max_model_len: int


def kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The pool's dtype for `kv_cache_dtype`."""
    if name == "auto":
        return model_dtype
    if name not in _DTYPES:
        raise ModelError(f"kv_cache_dtype must be 'auto' or one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def block_bytes(num_layers: int, kv_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one block of all layers, scales included."""
    if dtype not in LIMITS:
        return num_layers * math.prod(kv_shape) * dtype.itemsize
    if len(kv_shape) != 4 or kv_shape[0] != 2:
        raise ModelError(f"a KV cache of eight bits needs the common layout [2, token, head, dim], not {list(kv_shape)}")
    return num_layers * 2 * half_bytes(kv_shape)


def promised_bytes() -> int:
    """Host memory that this process's KV pools have, whether blocks were used already or not."""
    return sum(kv.num_bytes for kv in _host_pools if kv.pool is not None)


def host_pool_bytes(cache: CacheConfig, used_bytes: int = 0) -> int:
    """How many bytes the KV pool may have: as many as are asked for, or of this machine's memory beside `used_bytes`."""
    if cache.kv_cache_bytes is not None:
        return cache.kv_cache_bytes
    free = max(0, free_memory() - promised_bytes())
    return max(0, min(free // 4, free - used_bytes, _CPU_DEFAULT_MAX_BYTES))


def size_pool(num_bytes: int, block_bytes: int, block_size: int, context_length: int, wanted: int | None) -> Sizes:
    """Blocks that fit, and the context they allow: a context the user asked for must fit, the model's own may shrink."""
    num_blocks = num_bytes // block_bytes
    room = num_blocks * block_size
    if wanted is not None and wanted > context_length:
        raise ModelError(f"max_model_len {wanted} is beyond the model's context of {context_length} tokens")
    if room == 0 or (wanted is not None and wanted > room):
        needed = max(1, -(-(wanted or 1) // block_size))
        raise ModelError(
            f"max_model_len {wanted or 'any'} does not fit the KV pool: {needed} blocks of {show(block_bytes)} are "
            f"{show(needed * block_bytes)}, the pool has {show(num_bytes)}; raise kv_cache_bytes or gpu_memory_utilization, "
            "or lower max_model_len"
        )
    if wanted is None and room < context_length:
        log.warning("max_model_len is %d, not the model's %d: the KV pool holds no more tokens", room, context_length)
    return Sizes(num_blocks, min(wanted or context_length, room))


def no_pool(context_length: int, wanted: int | None) -> Sizes:
    """What a model that caches nothing has: the context that is wanted, as far as it was made for it."""
    if wanted is not None and wanted > context_length:
        raise ModelError(f"max_model_len {wanted} is beyond the model's context of {context_length} tokens")
    return Sizes(0, wanted or context_length)
