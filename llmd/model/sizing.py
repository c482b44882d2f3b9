"""How large the KV pool and the context are: reckoned before the weights are read, or measured beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmd.config import CacheConfig, SchedulerConfig
from llmd.model.blueprint import Blueprint
from llmd.model.kv_tensors import Sizes, block_bytes, kv_dtype, no_pool, pool_bytes, size_pool
from llmd.model.states import room_beside, without_blocks


class PoolSizing:
    """The arithmetic of one model's pool."""

    def __init__(self, cache: CacheConfig, scheduler: SchedulerConfig, blueprint: Blueprint, wanted: int | None) -> None:
        self.cache = cache  # its block size follows the model's kind
        self.dtype = kv_dtype(cache.kv_cache_dtype, blueprint.dtype)
        self._blueprint, self._num_rows, self._wanted = blueprint, scheduler.max_num_seqs, wanted
        self._context = blueprint.config.context_length
        if blueprint.config.rope.kind == "dynamic" and wanted is not None:
            self._context = max(self._context, wanted)  # stretched as far as it is told to

    @property
    def context(self) -> int:
        """Tokens of the longest sequence, as far as memory lets it."""
        return self._wanted or self._context

    @property
    def block_bytes(self) -> int:
        """What a block takes in all layers."""
        config = self._blueprint.config
        shape = self._blueprint.backend.kv_shape(self.cache.block_size, config.num_kv_heads, config.head_dim)
        return block_bytes(self._blueprint.num_kv_layers, shape, self.dtype)

    def before_weights(self, used: int) -> Sizes | None:
        """Known before the weights, where nothing need be measured: a context that does not fit is told at once."""
        blueprint = self._blueprint
        if blueprint.is_encoder:
            return no_pool(self._context, self._wanted)
        room = None
        if blueprint.device.type == "cpu" or self.cache.kv_cache_bytes is not None:
            room = room_beside(pool_bytes(self.cache, blueprint.device, used), blueprint.states, self._num_rows)
        if not blueprint.num_kv_layers:
            self.cache, sizes = without_blocks(self.cache, no_pool(self._context, self._wanted), self._num_rows)
            return sizes
        if room is None:
            return None
        return self._sizes(room)

    def beside(self, used: int) -> Sizes:
        """What the pool may have where so many bytes of the device are taken."""
        return self._sizes(pool_bytes(self.cache, self._blueprint.device, used))

    def _sizes(self, room: int) -> Sizes:
        return size_pool(room, self.block_bytes, self.cache.block_size, self._context, self._wanted)


def peak_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """Bytes of a GPU that are taken at the peak of some work, other processes' included."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return peak + max(0, others)
