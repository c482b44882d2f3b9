"""A paged KV pool whose blocks lie scattered, and the batches of rows that use it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmd.api.v1 import Batch


class PagedRows:
    """Rows of a paged KV pool: line numbers, blocks and free blocks are in random order, as after hours of serving."""

    def __init__(self, max_lens: Sequence[int], *, block_size: int = 16, seed: int = 0, device: str = "cpu") -> None:
        """`max_lens`: how many tokens each row has room for."""
        shuffle = random.Random(seed)
        self.block_size, self.device = block_size, torch.device(device)
        counts = [-(-length // block_size) for length in max_lens]
        self.num_blocks = sum(counts) + 3  # a few that belong to nobody
        blocks = shuffle.sample(range(self.num_blocks), sum(counts))
        lines = shuffle.sample(range(len(counts) + 2), len(counts))
        self.rows = torch.tensor(lines, device=self.device)
        self.block_table = torch.zeros(len(counts) + 2, max(counts, default=0) + 1, dtype=torch.int32, device=self.device)
        for line, count in zip(lines, counts, strict=True):
            self.block_table[line, :count] = torch.tensor(blocks[:count], dtype=torch.int32)
            del blocks[:count]

    def pool(self, kv_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """One layer [num_blocks, *kv_shape], NaN wherever nothing was stored."""
        return torch.full((self.num_blocks, *kv_shape), float("nan"), device=self.device).to(dtype)

    def batch(self, starts: Sequence[int], counts: Sequence[int], only: Sequence[int] | None = None) -> Batch:
        """A step that computes `counts` tokens of each row from `starts` on; `only` these rows take part."""
        members = list(range(len(starts))) if only is None else list(only)
        first = torch.tensor([starts[i] for i in members], device=self.device)
        count = torch.tensor([counts[i] for i in members], device=self.device)
        query_start = torch.zeros(len(members) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(count, 0, out=query_start[1:])
        index = torch.repeat_interleave(count)
        positions = torch.arange(len(index), device=self.device) + (first - query_start[:-1])[index]
        rows = self.rows[members]
        blocks = self.block_table[rows[index], positions // self.block_size].long()
        return Batch(
            input_ids=torch.zeros_like(positions),
            positions=positions,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            rows=rows,
            seq_lens=(first + count).to(torch.int32),
            query_start=query_start.to(torch.int32),
            block_tables=(self.block_table,),
            num_tokens=len(index),
            num_rows=len(members),
            max_query_len=int(count.max()),
            max_seq_len=int((first + count).max()),
            host_lens=np.asarray([[starts[i] for i in members], [counts[i] for i in members]]),
        )
