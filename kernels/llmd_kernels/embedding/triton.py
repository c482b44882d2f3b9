"""A piece of one row a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=("num_ids",), do_not_specialize_on_alignment=("ids",))
def look_up(out, ids, table, num_ids, dim, stride, BLOCK: tl.constexpr):
    """out[i] = table[ids[i]], ids brought into the table."""
    line = tl.program_id(0).to(tl.int64)
    row = tl.minimum(tl.maximum(tl.load(ids + line).to(tl.int64), 0), num_ids - 1)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + line * dim + i, tl.load(table + row * stride + i, mask=i < dim), mask=i < dim)


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids [...], contiguous; table [N, D] with dense rows, of any dtype."""
    check(ids, table)
    num_ids, dim = table.shape
    out = torch.empty(*ids.shape, dim, dtype=table.dtype, device=table.device)
    if out.numel():
        look_up[(ids.numel(), triton.cdiv(dim, _BLOCK))](out, ids, table, num_ids, dim, table.stride(0), BLOCK=_BLOCK)
    return out


def check(ids: torch.Tensor, table: torch.Tensor) -> None:
    """Raise ValueError with the reason if the kernel cannot serve these."""
    if table.dim() != 2 or not table.shape[0] or table.stride(1) != 1:
        raise ValueError(f"embedding wants a table [N, D] with dense rows, got {tuple(table.shape)}, {table.stride()}")
    if ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous():
        raise ValueError(f"embedding wants contiguous int32 or int64 ids, got {ids.dtype}, strides {ids.stride()}")
