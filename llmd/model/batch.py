"""From a StepPlan to tensors: the rows that persist on the device, and the Batch that one step's layers see.

No loop over tokens: a step's columns go to the device in one copy, and everything per token is built there from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmd.engine.step import BlockUpdate, StepPlan, TokenUpdate
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
    token_types: Tensor | None = None  # [T] int64, segments of a pair; None where the model has none
    # set by the runner
    kv: tuple[LayerKV, ...] = ()  # for each layer [num_blocks, *kv_shape], in eight bits with scales
    attention: Any = None  # what the attention backend's `prepare` gave
    states: tuple[Tensor, ...] = ()  # for each state that the model's layers keep [max_num_rows, *shape], persistent


class RowArrays:
    """The executor's persistent arrays, one line a row; the plan's rows are their line numbers."""

    def __init__(
        self,
        max_num_rows: int,
        max_model_len: int,
        block_size: int,
        num_groups: int,
        device: torch.device,
        *,
        with_token_types: bool = False,
    ) -> None:
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.device = device
        # One column more than the context: the token sampled at its end has a place, though it is never an input.
        self.token_ids = zeros((max_num_rows, max_model_len + 1), torch.int32, device)
        self.token_types = zeros((max_num_rows, max_model_len), torch.int32, device) if with_token_types else None
        width = -(-max_model_len // block_size) + 1
        self.block_tables = tuple(zeros((max_num_rows, width), torch.int32, device) for _ in range(num_groups))

    def admit(self, row: int, token_ids: np.ndarray, token_types: Sequence[int] = ()) -> None:
        """Write a sequence's known tokens into its row; token types that are not given are 0."""
        if self.token_types is not None:
            types = torch.zeros(len(token_ids), dtype=torch.int32)
            types[: len(token_types)] = torch.from_numpy(np.asarray(token_types, dtype=np.int32)[: len(token_ids)])
            self.token_types[row, : len(types)].copy_(types, non_blocking=True)
        ids = torch.from_numpy(token_ids.astype(np.int32))
        self.token_ids[row, : len(ids)].copy_(ids, non_blocking=True)

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
            table.view(-1)[self._to_device(places)] = self._to_device(ids)

    def update_tokens(self, updates: Sequence[TokenUpdate]) -> None:
        """Write tokens that are known without having been sampled."""
        for update in updates:
            ids = torch.from_numpy(np.asarray(update.token_ids, dtype=np.int32))
            self.token_ids[update.row, update.first_position : update.first_position + len(ids)].copy_(
                ids, non_blocking=True
            )

    def batch(self, plan: StepPlan) -> Batch:
        """The plan's scheduled tokens."""
        num_rows, num_tokens = len(plan.rows), plan.num_tokens
        columns = np.asarray((plan.rows, plan.starts, plan.counts), dtype=np.int64)
        max_query_len = int(columns[2].max(initial=0))
        if max_query_len == 1 and num_tokens == num_rows and self.device.type == "cpu" and self.token_types is None:
            return self._decode_batch(columns)
        rows, starts, counts = self._to_device(columns)
        query_start = torch.zeros(num_rows + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=query_start[1:])
        if max_query_len == 1:
            token_rows, positions = rows, starts
        else:
            index = torch.repeat_interleave(counts, output_size=num_tokens)
            positions = torch.arange(num_tokens, device=self.device) + (starts - query_start[:-1])[index]
            token_rows = rows[index]
        token_types = self.token_types[token_rows, positions].long() if self.token_types is not None else None
        return Batch(
            input_ids=self.token_ids[token_rows, positions].long(),
            positions=positions,
            slot_mapping=self._slots(token_rows, positions),
            rows=rows,
            seq_lens=(starts + counts).to(torch.int32),
            query_start=query_start.to(torch.int32),
            block_tables=self.block_tables,
            num_tokens=num_tokens,
            num_rows=num_rows,
            max_query_len=max_query_len,
            max_seq_len=int((columns[1] + columns[2]).max(initial=0)),
            token_types=token_types,
        )

    def _decode_batch(self, columns: np.ndarray) -> Batch:
        """One token a row, on a CPU: numpy's small operations cost a tenth of torch's."""
        rows, starts, _ = columns
        num_rows, lengths = len(rows), starts + 1
        slots = starts[:0]
        if self.block_tables:
            blocks = self.block_tables[0].numpy()[rows, starts // self.block_size]
            slots = blocks * np.int64(self.block_size) + starts % self.block_size
        return Batch(
            input_ids=torch.from_numpy(self.token_ids.numpy()[rows, starts].astype(np.int64)),
            positions=torch.from_numpy(starts),
            slot_mapping=torch.from_numpy(slots),
            rows=torch.from_numpy(rows),
            seq_lens=torch.from_numpy(lengths.astype(np.int32)),
            query_start=torch.from_numpy(np.arange(num_rows + 1, dtype=np.int32)),
            block_tables=self.block_tables,
            num_tokens=num_rows,
            num_rows=num_rows,
            max_query_len=1,
            max_seq_len=int(lengths.max()),
        )

    def _slots(self, token_rows: Tensor, positions: Tensor) -> Tensor:
        """Each token's place in the KV pool; an encoder has none."""
        if not self.block_tables:
            return positions[:0]
        blocks = self.block_tables[0][token_rows, positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def append(self, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Write sampled tokens at their positions; the next step reads them from here."""
        self.token_ids[rows, positions] = token_ids.to(torch.int32)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no memory on a CPU until they are touched."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
