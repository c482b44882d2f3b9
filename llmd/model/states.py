"""What rows keep between steps beside their KV blocks: recurrent states, one line a row in one pool of bytes.

    row 0 │ tensor 0 │ tensor 1 │ … │     a row's states lie together, so that they are emptied, or moved, in one piece;
    row 1 │ tensor 0 │ tensor 1 │ … │     layers see each tensor of all rows through a strided view [max_num_rows, *shape]

A sequence that is given a row finds zeros there, whoever had the row before and however its last step ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmd.config import CacheConfig
from llmd.errors import ModelError
from llmd.model.batch import Batch, zeros
from llmd.model.kv_tensors import Sizes, show

_ALIGNMENT = 64  # bytes, of each tensor of a row
_MAX_ROW_BYTES = 1 << 34


class StateShape(NamedTuple):
    """One tensor that every row keeps."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """With the room to the next one."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def row_bytes(shapes: Sequence[StateShape]) -> int:
    """Bytes of all states of a row."""
    return sum(shape.num_bytes for shape in shapes)


def check_shape(shape: Sequence[int], dtype: torch.dtype) -> StateShape:
    """What a layer asks for. Raises ModelError for what cannot be kept."""
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ModelError(f"a state has sizes above 0, and one at least; got {list(shape)}")
    if math.prod(shape) * dtype.itemsize > _MAX_ROW_BYTES:
        raise ModelError(f"a state of {list(shape)} takes more than {show(_MAX_ROW_BYTES)} a row")
    return StateShape(tuple(shape), dtype)


def room_beside(num_bytes: int, shapes: Sequence[StateShape], num_rows: int) -> int:
    """Bytes of the pool that the states of so many rows leave for KV blocks. Raises ModelError where they do not fit."""
    taken = row_bytes(shapes) * num_rows
    if taken > num_bytes:
        raise ModelError(
            f"the states of {num_rows} rows take {show(taken)} ({show(row_bytes(shapes))} each), the pool has "
            f"{show(num_bytes)}: lower max_num_seqs, or raise kv_cache_bytes or gpu_memory_utilization"
        )
    return num_bytes - taken


def without_blocks(cache: CacheConfig, sizes: Sizes, num_rows: int) -> tuple[CacheConfig, Sizes]:
    """A model that only keeps states: each sequence has one block, as long as the context and of no bytes.

    So the engine counts as for any other model. There are twice as many as rows: some are kept free by the watermark.
    """
    return cache.model_copy(update={"block_size": sizes.max_model_len}), sizes._replace(num_blocks=2 * num_rows)


class StateTensors:
    """Owns the states of all rows; like the KV pool they can be given back and taken again."""

    def __init__(self, shapes: Sequence[StateShape], num_rows: int, device: torch.device) -> None:
        self._shapes, self._num_rows, self._device = tuple(shapes), num_rows, device
        self.num_bytes = row_bytes(shapes) * num_rows
        self.tensors: tuple[Tensor, ...] = ()  # for each state [num_rows, *shape]
        self._pool: Tensor | None = None
        self.refill()

    def refill(self) -> None:
        """Take the memory (again), zeroed."""
        if not self._shapes:
            return
        self._pool = zeros((self._num_rows, row_bytes(self._shapes)), torch.uint8, self._device)
        parts = self._pool.split([shape.num_bytes for shape in self._shapes], dim=1)
        self.tensors = tuple(_view(part, shape) for part, shape in zip(parts, self._shapes, strict=True))

    def release(self) -> None:
        """Give the memory back."""
        self._pool, self.tensors = None, ()

    def begin(self, row: int) -> None:
        """A sequence is given the row: from zeros on."""
        if self._pool is not None:
            self._pool[row].zero_()


def _view(part: Tensor, shape: StateShape) -> Tensor:
    """[num_rows, bytes] → [num_rows, *shape] in the same memory."""
    size = math.prod(shape.shape)
    return part[:, : size * shape.dtype.itemsize].view(shape.dtype).unflatten(1, shape.shape)


@dataclass(frozen=True, slots=True)
class RowState:
    """One state of every row, as a layer asked for it with `Layers.state`; used within the layer's `forward` only.

    A row's state is zeros when its sequence begins, and whatever the layer wrote last when the sequence goes on: in the next
    chunk of its prompt, or token by token. A sequence that was preempted begins again. Executor thread.

        self.sums = layers.state((size,), torch.float32)            # in __init__
        total = self.sums.read(batch) + add                         # in forward: [R, size], a copy
        self.sums.write(batch, total)
    """

    index: int  # among the model's states
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, batch: Batch) -> Tensor:
        """[R, *shape], a copy: the states of the step's rows, in the order of `batch.rows`."""
        return batch.states[self.index].index_select(0, batch.rows)

    def write(self, batch: Batch, values: Tensor) -> None:
        """Keep [R, *shape] (any float dtype) for the rows' next step."""
        batch.states[self.index].index_copy_(0, batch.rows, values.to(self.dtype))
