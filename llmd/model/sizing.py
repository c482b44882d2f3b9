"""How large the KV pool and the context are: reckoned before the weights are read, or measured beside them.

On a GPU two bounds hold, and the smaller one counts. The share: gpu_memory_utilization of the device for this model,
whatever its neighbours have, as vLLM means it; so two of 0.45 lie beside each other. And what is free now: a neighbour that
came first keeps what it has, with a reserve for fragmentation. Free memory is read again right before the pool is taken, and
once more where somebody else was quicker.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

from llmd.config import CacheConfig, SchedulerConfig
from llmd.errors import ModelError
from llmd.model.blueprint import Blueprint
from llmd.model.cuda_graphs import sizes_of
from llmd.model.device_memory import DeviceMemory, Peak, device_memory, give_back
from llmd.model.estimates import activation_bytes, sampling_bytes
from llmd.model.estimates import graph_bytes as reckon_graphs
from llmd.model.kv_tensors import NoRoom, Sizes, block_bytes, host_pool_bytes, kv_dtype, no_pool, size_pool
from llmd.model.memory_account import MemoryAccount, memory_notes
from llmd.model.memory_room import RESERVE_BYTES, host_memory, show
from llmd.model.states import room_beside, row_bytes, without_blocks

log = logging.getLogger("llmd.model")

_MAX_TRIES = 4  # to take a pool that neighbours are taking memory from
_MAX_GRAPHS_SHARE = 4  # times what a formula says, and neighbours were measured too
_NEWS_BYTES = 16 << 20  # that neighbours take are worth a line

_neighbours: weakref.WeakSet[PoolSizing] = weakref.WeakSet()  # models of this process that are on a GPU


class PoolSizing:
    """The arithmetic of one model's pool. It lives as long as the model: others see what this one may still take."""

    def __init__(self, cache: CacheConfig, scheduler: SchedulerConfig, blueprint: Blueprint, wanted: int | None) -> None:
        self.cache = cache  # its block size follows the model's kind
        self.dtype = kv_dtype(cache.kv_cache_dtype, blueprint.dtype)
        self._blueprint, self._scheduler, self._wanted = blueprint, scheduler, wanted
        self._context = blueprint.config.context_length
        if blueprint.config.rope.kind == "dynamic" and wanted is not None:
            self._context = max(self._context, wanted)  # stretched as far as it is told to
        self._sizes: Sizes | None = None
        self._device = blueprint.device
        self._is_gpu = self._device.type == "cuda"
        self._before = device_memory(self._device) if self._is_gpu else _host()
        self._peak: Peak | None = None
        self._bound = ""  # which of the two holds
        self._graph_bytes = 0
        self._working_bytes = 0  # beside weights and pool, in tensors that come and go

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

    @property
    def num_profile_blocks(self) -> int:
        """Blocks of the pool beside which the largest step is measured."""
        return -(-self._scheduler.max_num_batched_tokens // self.cache.block_size) + 1

    # --- how large

    def before_weights(self, used: int) -> Sizes | None:
        """Known before the weights, where nothing need be measured: a context that does not fit is told at once."""
        self._sizes = self._known(used)
        return self._sizes

    def _known(self, used: int) -> Sizes | None:
        blueprint, num_rows = self._blueprint, self._scheduler.max_num_seqs
        if blueprint.is_encoder:
            return no_pool(self._context, self._wanted)
        room = None
        if not self._is_gpu or self.cache.kv_cache_bytes is not None:
            room = room_beside(host_pool_bytes(self.cache, used), blueprint.states, num_rows)
            self._check_exact()
        if not blueprint.num_kv_layers:
            self.cache, sizes = without_blocks(self.cache, no_pool(self._context, self._wanted), num_rows)
            return sizes
        return None if room is None else self._fit(room)

    def _check_exact(self) -> None:
        """A pool of an exact size is no use where the GPU has not so much."""
        wanted, now = self.cache.kv_cache_bytes or 0, self._before
        if self._is_gpu and wanted > now.reachable_bytes:
            raise ModelError(
                f"cache.kv_cache_bytes {show(wanted)} is more than {self._device} has: {show(now.free_bytes)} of "
                f"{show(now.total_bytes)} are free, {show(now.outside_bytes)} are others'"
            )

    def beside(self, peak: Peak, *, graph_bytes: int = 0) -> Sizes:
        """What the pool may have beside the weights and the largest step. Raises ModelError, with the sum, where nothing is.

        `graph_bytes`: of all decode graphs that there will be. The profile's own pool had `num_profile_blocks`.
        """
        self._peak, self._graph_bytes = peak, self._likely_graph_bytes(graph_bytes)
        now = device_memory(self._device)
        if (taken := peak.after.free_bytes - now.free_bytes) > _NEWS_BYTES:
            log.warning("others took %s of %s since the largest step was measured", show(taken), self._device)
        self._working_bytes = max(0, self._peak_bytes - now.allocated_bytes) + self._graph_bytes
        _neighbours.add(self)
        self._sizes = self._fit(self._room(now))
        return self._sizes

    def _likely_graph_bytes(self, found: int) -> int:
        """As found by what was free before and after some of them: a neighbour that came meanwhile is no graph."""
        most = _MAX_GRAPHS_SHARE * reckon_graphs(sizes_of(self._scheduler.max_num_seqs), self._blueprint)
        if found > most:
            log.warning("%s for graphs are more than they can be, a neighbour came: taken as %s", show(found), show(most))
        return min(found, most)

    def settle(self, sizes: Sizes, allocate: Callable[[Sizes], None]) -> Sizes:
        """Take the pool. Where a neighbour was quicker, free memory is read again and the pool is smaller.

        Raises ModelError where nothing is left, and at once where the size was not measured but asked for.
        """
        for _ in range(_MAX_TRIES):
            try:
                allocate(sizes)
            except NoRoom as error:
                if self._peak is None:
                    raise
                give_back(self._device)
                fewer = self._fit(self._room(device_memory(self._device)))
                if fewer.num_blocks >= sizes.num_blocks:
                    raise
                log.warning("%s; now %d KV blocks, not %d", error, fewer.num_blocks, sizes.num_blocks)
                sizes = fewer
            else:
                self._sizes = sizes
                return sizes
        raise NoRoom(f"neighbours on {self._device} take its memory faster than a KV pool can be sized: start again")

    def _fit(self, room: int) -> Sizes:
        return size_pool(room, self.block_bytes, self.cache.block_size, self._context, self._wanted)

    def _room(self, now: DeviceMemory) -> int:
        """Bytes for the pool, of the share or of what is free."""
        of_share = self._limit_bytes - self._needed_bytes
        of_free = now.reachable_bytes - self._peak_bytes - self._graph_bytes - self._reserve_bytes - self._promised_bytes
        if min(of_share, of_free) <= 0:
            raise ModelError(self._no_room(of_share, now))
        self._bound = "what the share leaves" if of_share <= of_free else "what is free leaves"
        return min(of_share, of_free)

    def _no_room(self, of_share: int, now: DeviceMemory) -> str:
        account = self.account(weights_bytes=now.allocated_bytes - self._before.allocated_bytes)
        if of_share <= 0:
            return (
                f"gpu_memory_utilization {self.cache.gpu_memory_utilization} leaves no room for a KV pool: it is "
                f"{show(self._limit_bytes)} of {show(now.total_bytes)}, and {account.arithmetic()}"
            )
        return (
            f"no memory is left for a KV pool on {self._device}: {account.arithmetic()} of {show(now.total_bytes)}, others "
            f"have {show(now.outside_bytes + self._before.allocated_bytes)}, and {show(self._reserve_bytes)} are kept free; "
            "give each model and each process its share with gpu_memory_utilization or kv_cache_bytes"
        )

    @property
    def _limit_bytes(self) -> int:
        return int(self._before.total_bytes * self.cache.gpu_memory_utilization)

    @property
    def _peak_bytes(self) -> int:
        """In tensors at the peak, of all models of this process, without the pool that was only there for the profile."""
        assert self._peak is not None
        at_least = self._peak.after.allocated_bytes + sampling_bytes(self._scheduler, self._blueprint)
        return max(at_least, self._peak.allocated_bytes - self.num_profile_blocks * self.block_bytes)

    @property
    def _needed_bytes(self) -> int:
        """Of this model, beside the pool."""
        return self._peak_bytes - self._before.allocated_bytes + self._graph_bytes + self._outside_bytes

    @property
    def _outside_bytes(self) -> int:
        """What was taken outside of torch since this model came; by whom, nobody says."""
        now = self._peak.after if self._peak is not None else device_memory(self._device)
        return max(0, now.outside_bytes - self._before.outside_bytes)

    @property
    def _reserve_bytes(self) -> int:
        """What was lost in fragments, or a hundredth of the device."""
        lost = self._peak.reserved_bytes - self._peak.allocated_bytes if self._peak is not None else 0
        return max(lost, self._before.total_bytes // 100)

    @property
    def _promised_bytes(self) -> int:
        """What other models of this process take while they compute."""
        others = (other for other in _neighbours if other is not self and other._device == self._device)
        return sum(other._working_bytes for other in others)

    # --- the account

    def account(self, *, weights_bytes: int, adapter_bytes: int = 0, graph_bytes: int = 0) -> MemoryAccount:
        """The table, once the pool is sized. `graph_bytes`: of graphs, where nothing was measured."""
        sizes = self._sizes or Sizes(0, self.context)
        states = row_bytes(self._blueprint.states) * self._scheduler.max_num_seqs
        return MemoryAccount(
            device=str(self._device),
            device_bytes=self._before.total_bytes,
            others_bytes=self._before.total_bytes - self._before.free_bytes,
            limit_bytes=self._limit_bytes if self._peak is not None else None,
            weights_bytes=weights_bytes,
            adapter_bytes=adapter_bytes,
            activation_bytes=self._activation_bytes(weights_bytes + adapter_bytes + states),
            graph_bytes=self._graph_bytes if self._peak is not None else graph_bytes,
            outside_bytes=self._outside_bytes if self._is_gpu else 0,
            reserve_bytes=self._reserve_bytes if self._is_gpu else RESERVE_BYTES,
            state_bytes=states,
            block_bytes=self.block_bytes if self._blueprint.num_kv_layers else 0,
            block_size=self.cache.block_size,
            num_blocks=sizes.num_blocks,
            max_model_len=sizes.max_model_len,
            max_num_seqs=self._scheduler.max_num_seqs,
            notes=self._notes(),
        )

    def _activation_bytes(self, held: int) -> int:
        """As measured; the formula's where nothing was."""
        if self._peak is None:
            return activation_bytes(self._scheduler, self._blueprint)
        return max(0, self._peak_bytes - self._before.allocated_bytes - held)

    def _notes(self) -> dict[str, str]:
        is_measured = self._peak is not None
        notes = memory_notes(self.cache, self._scheduler, is_gpu=self._is_gpu, is_measured=is_measured)
        if is_measured:
            num_sizes = len(sizes_of(self._scheduler.max_num_seqs))
            notes |= {
                "KV pool": self._bound,
                "graphs": f"by the largest and the smallest of {num_sizes} sizes of decode steps",
            }
        return notes


def _host() -> DeviceMemory:
    """This machine's, or what a container may have of it."""
    memory = host_memory()
    return DeviceMemory(max(memory.total_bytes, memory.free_bytes), memory.free_bytes, 0, 0)
