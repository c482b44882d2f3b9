"""A piece of one row a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=("num_ids",))
def look_up(out, ids, table, num_ids, dim, stride, BLOCK: tl.constexpr):
    """out[i] = table[ids[i]], ids brought into the table."""
    line = tl.program_id(0).to(tl.int64)
    row = tl.minimum(tl.maximum(tl.load(ids + line).to(tl.int64), 0), num_ids - 1)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + line * dim + i, tl.load(table + row * stride + i, mask=i < dim), mask=i < dim)


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids [...], contiguous; table [N, D] with dense rows, of any dtype."""
    num_ids, dim = table.shape
    out = torch.empty(*ids.shape, dim, dtype=table.dtype, device=table.device)
    if out.numel():
        look_up[(ids.numel(), triton.cdiv(dim, _BLOCK))](out, ids, table, num_ids, dim, table.stride(0), BLOCK=_BLOCK)
    return out
