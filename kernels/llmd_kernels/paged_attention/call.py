"""What one call of paged attention is given."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmd_kernels.quantized_kv import LIMITS, QuantizedKV


class AttentionCall(NamedTuple):
    """T tokens of R rows, H query heads over K heads of keys and values, those of this step already stored."""

    q: torch.Tensor  # [T, H, D], the heads dense
    kv: torch.Tensor | QuantizedKV  # [num_blocks, 2, block_size, K, D], one layer's view
    block_table: torch.Tensor  # [max_rows, W] int32
    rows: torch.Tensor  # [R] int64, each scheduled row's line in it
    query_start: torch.Tensor  # [R+1] int32, where a row's tokens begin in q
    seq_lens: torch.Tensor  # [R] int32, tokens of the row this step's included
    max_query_len: int  # most tokens of a row in this step
    scale: float
    window: int | None = None  # a token sees itself and so many less one before it
    soft_cap: float | None = None  # scores become cap · tanh(score / cap)
    sinks: torch.Tensor | None = None  # [H] float32, a score more in each head's softmax, of nothing
    alibi_slopes: torch.Tensor | None = None  # [H] float32, times a key's distance before the query, taken off its score

    def check(self) -> None:
        """Raise ValueError for shapes and dtypes that no kernel serves."""
        heads, dim = self.q.shape[1:]
        if heads % self.kv.shape[3] or dim != self.kv.shape[4]:
            raise ValueError(f"q {tuple(self.q.shape)} does not fit a cache {tuple(self.kv.shape)}")
        if isinstance(self.kv, torch.Tensor) and self.kv.dtype in LIMITS:
            raise ValueError(f"a cache of {self.kv.dtype} needs its scales: give a QuantizedKV")
        for name in ("sinks", "alibi_slopes"):
            given = getattr(self, name)
            if given is not None and (given.shape != (heads,) or given.dtype != torch.float32):
                raise ValueError(f"{name} must be [{heads}] float32, got {tuple(given.shape)} {given.dtype}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap must be above 0, got {self.soft_cap}")
