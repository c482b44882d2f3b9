"""Where a device's memory goes, in one table: reckoned by `llmd plan`, measured at the start, told by `llmd status`.

device          all of it
others          what was taken when this model came: other processes, other models, the driver and its context
share           of the device, that this model may take: cache.gpu_memory_utilization
weights, adapters, activations, graphs, outside torch
reserve         kept free: what fragmentation wastes, and neighbours that grow
states          of rows, where the model is recurrent
KV pool         what the share leaves, or what is free, whichever is less: blocks × bytes
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmd.config import CacheConfig, SchedulerConfig
from llmd.model.memory_room import show


class Row(NamedTuple):
    """A line of the table: bytes, or a count where there is no unit."""

    name: str
    value: int
    is_bytes: bool
    note: str

    def __str__(self) -> str:
        value = show(self.value) if self.is_bytes else f"{self.value:,}"
        return f"  {self.name:<14}{value:>14}  {self.note}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAccount:
    """Bytes of one model on one device. What is 0 does not apply."""

    device: str
    device_bytes: int | None = None  # None: not known
    others_bytes: int = 0
    limit_bytes: int | None = None  # None: not limited but by what is free
    weights_bytes: int = 0
    adapter_bytes: int = 0
    activation_bytes: int = 0  # of the largest step
    graph_bytes: int = 0
    outside_bytes: int = 0  # of torch's allocator: loaded kernels, libraries' workspaces
    reserve_bytes: int = 0
    state_bytes: int = 0  # of all rows, beside their blocks
    block_bytes: int = 0
    block_size: int = 1
    num_blocks: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 0
    notes: dict[str, str] = field(default_factory=dict)  # by the row's name: why it is so large, or how it was found

    @property
    def pool_bytes(self) -> int:
        """Of the KV pool."""
        return self.num_blocks * self.block_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """In all layers, scales included."""
        return -(-self.block_bytes // self.block_size)

    @property
    def num_tokens(self) -> int:
        """That the pool holds; 0 for a model without one."""
        return self.num_blocks * self.block_size if self.block_bytes else 0

    @property
    def num_sequences(self) -> int:
        """Of the full length that run at once."""
        return min(self.num_tokens // self.max_model_len, self.max_num_seqs) if self.max_model_len else 0

    @property
    def taken_bytes(self) -> int:
        """What the model takes of its device once everything is in use; what is kept free is not taken."""
        parts = (
            self.weights_bytes, self.adapter_bytes, self.activation_bytes, self.graph_bytes, self.outside_bytes,
            self.state_bytes, self.pool_bytes,
        )  # fmt: skip
        return sum(parts)

    @property
    def room_bytes(self) -> int:
        """What the device and the share leave beside all of this; below 0 where that is too much."""
        return min(self._bounds.values(), default=self.taken_bytes) - self.taken_bytes

    @property
    def bound(self) -> str:
        """Which of the two is tighter, in words."""
        return min(self._bounds, key=self._bounds.__getitem__, default="")

    @property
    def _bounds(self) -> dict[str, int]:
        """The most that the model may take."""
        bounds = {} if self.limit_bytes is None else {"what the share leaves": self.limit_bytes}
        if self.device_bytes is not None:
            bounds["what is free leaves"] = self.device_bytes - self.others_bytes - self.reserve_bytes
        return bounds

    @property
    def missing_bytes(self) -> int:
        """What is lacking; 0 where all fits."""
        return max(0, -self.room_bytes)

    def rows(self) -> Iterator[Row]:
        """The table from top to bottom."""
        sizes = (
            ("device", self.device_bytes), ("others", self.others_bytes), ("share", self.limit_bytes),
            ("weights", self.weights_bytes), ("adapters", self.adapter_bytes), ("activations", self.activation_bytes),
            ("graphs", self.graph_bytes), ("outside torch", self.outside_bytes), ("reserve", self.reserve_bytes),
        )  # fmt: skip
        yield from (Row(name, size, True, self.notes.get(name, "")) for name, size in sizes if size)
        if self.state_bytes:
            yield Row("states", self.state_bytes, True, f"{show(self.state_bytes // self.max_num_seqs)} for each row")
        if self.state_bytes and not self.block_bytes:
            yield Row("sequences", self.max_num_seqs, False, "run at once")
        if not self.block_bytes:
            return
        blocks = f"{self.num_blocks:,} blocks × {show(self.block_bytes)}"
        yield Row("KV pool", self.pool_bytes, True, "; ".join(filter(None, (blocks, self.notes.get("KV pool")))))
        context = f"{show(self.kv_bytes_per_token)} each; context of {self.max_model_len:,}"
        yield Row("tokens", self.num_tokens, False, context)
        most = f"of full length; at most {self.max_num_seqs} run at once"
        yield Row("sequences", self.num_sequences, False, most)

    def plain(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [row._asdict() for row in self.rows()]

    def told(self, log: logging.Logger) -> list[dict[str, Any]]:
        """Log the table; the rows as plain data, for `llmd status`."""
        log.info("memory of %s:\n%s", self.device, "\n".join(map(str, self.rows())))
        return self.plain()

    def arithmetic(self) -> str:
        """What is taken beside the pool, as a sum, for an error."""
        names = ("weights", "adapters", "activations", "graphs", "outside torch", "states")
        parts = [(row.name, row.value) for row in self.rows() if row.name in names]
        return f"{' + '.join(f'{name} {show(size)}' for name, size in parts)} = {show(sum(size for _, size in parts))}"


def memory_notes(cache: CacheConfig, scheduler: SchedulerConfig, *, is_gpu: bool, is_measured: bool) -> dict[str, str]:
    """What stands beside the rows."""
    found = "measured" if is_measured else "estimated"
    notes = {
        "activations": f"{found}: a step of {scheduler.max_num_batched_tokens:,} tokens, {scheduler.max_num_seqs} rows",
        "others": "taken by other processes",
        "reserve": "requests and text",
        "KV pool": "a quarter of what is free, at most 4 GiB",
    }
    if is_gpu:
        notes |= {
            "others": "other processes and models, the driver and its context",
            "share": f"of this model: cache.gpu_memory_utilization {cache.gpu_memory_utilization:g}",
            "graphs": "estimated: decode steps as graphs",
            "outside torch": f"{found}: loaded kernels, libraries' workspaces",
            "reserve": "kept free: fragments, neighbours that grow",
            "KV pool": "",
        }
    return notes | ({"KV pool": "cache.kv_cache_bytes"} if cache.kv_cache_bytes is not None else {})
