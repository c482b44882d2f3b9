"""One head of one token a program: both halves of its turned dims are read, turned and written back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def turn(
    q, k, positions, cos_sin, heads, dim, q_stride, k_stride, half, max_position, BLOCK: tl.constexpr
):  # fmt: skip
    """The head tl.program_id(1) of q or, past its `heads`, of k."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.minimum(tl.maximum(tl.load(positions + token), 0), max_position - 1)
    i = tl.arange(0, BLOCK)
    mask = i < half
    line = cos_sin + position * 2 * half + i
    cos, sin = tl.load(line, mask=mask, other=0.0), tl.load(line + half, mask=mask, other=0.0)
    if head < heads:  # noqa: SIM108 - a line that fits
        x = q + token * q_stride + head * dim + i
    else:
        x = k + token * k_stride + (head - heads) * dim + i
    first, second = tl.load(x, mask=mask, other=0.0).to(tl.float32), tl.load(x + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(x, (first * cos - second * sin).to(q.dtype.element_ty), mask=mask)
    tl.store(x + half, (second * cos + first * sin).to(q.dtype.element_ty), mask=mask)


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """q [T, H, D] and k [T, K, D] with dense heads; rows may be strided."""
    num_tokens, heads, dim = q.shape
    half = cos_sin.shape[1] // 2
    turn[(num_tokens, heads + k.shape[1])](
        q, k, positions, cos_sin, heads, dim, q.stride(0), k.stride(0), half, cos_sin.shape[0],
        BLOCK=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
