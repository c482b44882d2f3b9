"""From a StepPlan to tensors: the rows that persist on the device, and the Batch that one step's layers see.

No loop over tokens: a step's columns go to the device in one copy, and everything per token is built there from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmd.engine.step import BlockUpdate, StepPlan, TokenUpdate
from llmd.model.staging import Ring, put, send
from llmd_kernels.prepare_batch import DecodeInputs, new_inputs, prepare_batch, prepare_decode
from llmd_kernels.quantized_kv import LayerKV


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step as the layers see it: T tokens of R scheduled rows, N of them with logits."""

    # set by RowArrays.batch
    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64, block · block_size + offset of group 0
    rows: Tensor  # [R] int64, each scheduled row's line in the persistent arrays
    seq_lens: Tensor  # [R] int32, the row's tokens once this step is computed
    query_start: Tensor  # [R+1] int32, where a row's tokens begin among the T
    block_tables: tuple[Tensor, ...]  # for each KV group [max_num_rows, W] int32, persistent: index it by `rows`
    num_tokens: int  # T
    num_rows: int  # R
    max_query_len: int
    max_seq_len: int
    host_lens: np.ndarray | None = None  # [2, R] int64, starts and counts on the host; None in recorded steps
    token_types: Tensor | None = None  # [T] int64, segments of a pair; None where the model has none
    # set by the runner
    kv: tuple[LayerKV, ...] = ()  # for each layer [num_blocks, *kv_shape], in eight bits with scales
    attention: Any = None  # what the attention backend's `prepare` gave
    states: tuple[Tensor, ...] = ()  # for each state that the model's layers keep [max_num_rows, *shape], persistent


class RowArrays:
    """The executor's persistent arrays, one line a row; the plan's rows are their line numbers.

    Behind them lies the spare line: places of a recorded step that no row takes compute its one token, in a block of the KV
    pool that is nobody else's.
    """

    def __init__(
        self,
        max_num_rows: int,
        max_model_len: int,
        block_size: int,
        num_groups: int,
        device: torch.device,
        *,
        spare_block: int = 0,
        with_token_types: bool = False,
    ) -> None:
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.device = device
        self.max_num_rows = self.spare = max_num_rows
        num_lines = max_num_rows + 1
        # One column more than the context: the token sampled at its end has a place, though it is never an input.
        self.token_ids = zeros((num_lines, max_model_len + 1), torch.int32, device)
        self.token_types = zeros((num_lines, max_model_len), torch.int32, device) if with_token_types else None
        width = -(-max_model_len // block_size) + 1
        self.block_tables = tuple(zeros((num_lines, width), torch.int32, device) for _ in range(num_groups))
        for table in self.block_tables:
            table[self.spare, 0] = spare_block
        self.decode = DecodeColumns(self)

    def admit(self, row: int, token_ids: np.ndarray, token_types: Sequence[int] = ()) -> None:
        """Write a sequence's known tokens into its row; token types that are not given are 0."""
        if self.token_types is not None:
            types = np.zeros(len(token_ids), np.int32)
            types[: len(token_types)] = token_types[: len(token_ids)]
            put(self.token_types[row, : len(types)], types)
        put(self.token_ids[row, : len(token_ids)], token_ids.astype(np.int32))

    def update_blocks(self, updates: Sequence[BlockUpdate]) -> None:
        """Write block ids into the block tables: one scatter a KV group."""
        for group, table in enumerate(self.block_tables):
            mine = [update for update in updates if update.group == group]
            if not mine:
                continue
            width = table.shape[1]
            lengths = [len(update.block_ids) for update in mine]
            starts = np.asarray([update.row * width + update.first_index for update in mine], dtype=np.int64)
            ends = np.cumsum(lengths)
            places = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
            ids = np.fromiter(chain.from_iterable(update.block_ids for update in mine), np.int32, ends[-1])
            table.view(-1)[send(places, self.device)] = send(ids, self.device)

    def update_tokens(self, updates: Sequence[TokenUpdate]) -> None:
        """Write tokens that are known without having been sampled."""
        for row, first, token_ids in updates:
            put(self.token_ids[row, first : first + len(token_ids)], np.asarray(token_ids, dtype=np.int32))

    def batch(self, plan: StepPlan) -> Batch:
        """The plan's scheduled tokens, once its blocks are in the tables."""
        num_rows, num_tokens = len(plan.rows), plan.num_tokens
        max_query_len = max(plan.counts)
        max_seq_len = max(map(sum, zip(plan.starts, plan.counts, strict=True)))
        if max_query_len == 1 and num_tokens == num_rows and self.decode.is_on_host and self.token_types is None:
            self.decode.write(plan, num_rows)
            return replace(self.decode.batch(num_rows), max_seq_len=max_seq_len, host_lens=self.decode.host_lens(num_rows))
        self.update_blocks(plan.block_updates)
        host = np.asarray((plan.rows, plan.starts, plan.counts), dtype=np.int64)
        columns = send(host, self.device)
        table = self.block_tables[0] if self.block_tables else None
        inputs = new_inputs(num_tokens, num_rows, self.device, has_blocks=table is not None)
        prepare_batch(inputs, columns, self.token_ids, table, self.block_size)
        types = self.token_types
        return Batch(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            rows=columns[0],
            seq_lens=inputs.seq_lens,
            query_start=inputs.query_start,
            block_tables=self.block_tables,
            num_tokens=num_tokens,
            num_rows=num_rows,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            host_lens=host[1:],
            token_types=None if types is None else types[inputs.token_rows, inputs.positions].long(),
        )

    def append(self, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Write sampled tokens at their positions; the next step reads them from here."""
        self.token_ids[rows, positions] = token_ids.to(torch.int32)


class DecodeColumns:
    """The inputs of steps in which every row computes one token, in the same place every time: recorded steps look there.

    On a GPU a step's columns go over in one copy from pinned memory, and `prepare`, which is recorded with the step, makes
    the inputs of them. On a CPU `write` makes them, and there is nothing to prepare.
    """

    def __init__(self, rows: RowArrays) -> None:
        self._rows = rows
        num, device = rows.max_num_rows, rows.device
        self._table = rows.block_tables[0] if rows.block_tables else None
        self._columns = torch.zeros(3 * _even(num), dtype=torch.int64, device=device)  # lines, positions, blocks that came
        self._ring = Ring(3 * _even(num), torch.int64, device) if device.type != "cpu" else None
        self._inputs = DecodeInputs(
            torch.zeros(num, dtype=torch.int64, device=device),
            torch.zeros(num if rows.block_tables else 0, dtype=torch.int64, device=device),
            torch.zeros(num, dtype=torch.int32, device=device),
            torch.zeros(num, dtype=torch.int64, device=device),
        )
        self._query_start = torch.arange(num + 1, dtype=torch.int32, device=device)
        self._batches: dict[int, Batch] = {}

    @property
    def is_on_host(self) -> bool:
        """Whether `write` makes the inputs."""
        return self._ring is None

    def batch(self, size: int) -> Batch:
        """A step of so many rows, as the layers see it, once it was written; no context is longer than the longest."""
        known = self._batches.get(size)
        if known is None:
            known = self._batches[size] = self._batch(size)
        return known

    def host_lens(self, size: int) -> np.ndarray:
        """As Batch has them, on a CPU."""
        return np.stack((self._placed(size)[1].numpy(), np.ones(size, np.int64)))

    def num_tokens(self, size: int) -> Tensor:
        """[size] int64: what each row has once the step is computed."""
        return self._inputs.num_tokens[:size]

    def write(self, plan: StepPlan, size: int) -> None:
        """A plan's rows in the first places of a step of `size` rows, the spare line in the others; its blocks too."""
        num_rows, rows = len(plan.rows), self._rows
        columns = (self._columns if self._ring is None else self._ring.next())[: 3 * _even(size)]
        lines, positions, blocks = columns.numpy().reshape(3, -1)[:, :size]
        lines[:num_rows], positions[:num_rows] = plan.rows, plan.starts
        lines[num_rows:], positions[num_rows:] = rows.spare, 0
        if self._ring is None:
            rows.update_blocks(plan.block_updates)
            self._prepare_host(lines, positions)
            return
        blocks[:] = -1
        rows.update_blocks(self._others(plan, blocks))
        self._columns[: len(columns)].copy_(columns, non_blocking=True)

    def prepare(self, size: int) -> None:
        """Make the inputs of a step of `size` rows from its columns, on a GPU."""
        if self._ring is not None:
            inputs = DecodeInputs(*(column[:size] for column in self._inputs))
            prepare_decode(inputs, self._placed(size), self._rows.token_ids, self._table, self._rows.block_size)

    def _placed(self, size: int) -> Tensor:
        """[3, size]: each column begins where kernels may load sixteen bytes at once, as they are compiled for."""
        return self._columns[: 3 * _even(size)].view(3, -1)[:, :size]

    def _batch(self, size: int) -> Batch:
        columns, inputs = self._placed(size), self._inputs
        return Batch(
            input_ids=inputs.input_ids[:size],
            positions=columns[1],
            slot_mapping=inputs.slot_mapping[:size],
            rows=columns[0],
            seq_lens=inputs.seq_lens[:size],
            query_start=self._query_start[: size + 1],
            block_tables=self._rows.block_tables,
            num_tokens=size,
            num_rows=size,
            max_query_len=1,
            max_seq_len=self._rows.max_model_len,
        )

    def _others(self, plan: StepPlan, blocks: np.ndarray) -> list[BlockUpdate]:
        """Put each block that a row's own token begins into `blocks`; the updates that are none of these."""
        if not plan.block_updates:
            return []
        place_of, size = {row: place for place, row in enumerate(plan.rows)}, self._rows.block_size
        others = []
        for update in plan.block_updates:
            place = place_of.get(update.row)
            is_own = place is not None and update.first_index == plan.starts[place] // size
            if is_own and update.group == 0 and len(update.block_ids) == 1:
                blocks[place] = update.block_ids[0]
            else:
                others.append(update)
        return others

    def _prepare_host(self, lines: np.ndarray, positions: np.ndarray) -> None:
        """As the kernel does; numpy's small operations cost a tenth of torch's."""
        num, inputs = len(lines), self._inputs
        inputs.input_ids.numpy()[:num] = self._rows.token_ids.numpy()[lines, positions]
        lengths = np.add(positions, 1, out=inputs.num_tokens.numpy()[:num])
        inputs.seq_lens.numpy()[:num] = lengths
        if self._table is not None:
            block_size = self._rows.block_size
            slots = self._table.numpy()[lines, positions // block_size] * np.int64(block_size)
            np.add(slots, positions % block_size, out=inputs.slot_mapping.numpy()[:num])


def _even(size: int) -> int:
    return size + size % 2


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no memory on a CPU until they are touched."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
