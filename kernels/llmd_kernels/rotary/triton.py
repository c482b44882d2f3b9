"""Several heads of one token a program: both halves of their turned dims are read, turned and written back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.triton_barrier import full_barrier

_NUMBERS = 1024  # of a program's heads: 16 bytes of each half a thread, twice


@triton.jit(do_not_specialize_on_alignment=("positions",))
def turn(
    q, k, positions, cos_sin, q_stride, k_stride, max_position, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of q or, past those, of k."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.minimum(tl.maximum(tl.load(positions + token), 0), max_position - 1)
    i = tl.arange(0, BLOCK)
    line = cos_sin + position * (2 * HALF) + i
    cos = tl.load(line, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(line + HALF, mask=i < HALF, other=0.0)[None, :]
    q_groups: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    # Whose heads they are is told by masks: AMD's compiler (Triton 3.6) does not take a pointer that is one of two.
    is_q = group < q_groups
    head = tl.where(is_q, group, group - q_groups) * HEADS + tl.arange(0, HEADS)
    place, is_pair = head[:, None] * DIM + i[None, :], (i < HALF)[None, :]
    of_q, of_k = (is_q & (head < Q_HEADS))[:, None] & is_pair, ((group >= q_groups) & (head < K_HEADS))[:, None] & is_pair
    x, y = q + token * q_stride + place, k + token * k_stride + place
    first = tl.load(x, mask=of_q, other=0.0).to(tl.float32) + tl.load(y, mask=of_k, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=of_q, other=0.0).to(tl.float32) + tl.load(y + HALF, mask=of_k, other=0.0).to(tl.float32)
    full_barrier()  # all is read before any is overwritten
    low, high = (first * cos - second * sin).to(q.dtype.element_ty), (second * cos + first * sin).to(q.dtype.element_ty)
    tl.store(x, low, mask=of_q)
    tl.store(y, low, mask=of_k)
    tl.store(x + HALF, high, mask=of_q)
    tl.store(y + HALF, high, mask=of_k)


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """q [T, H, D] and k [T, K, D] of one dtype with dense heads; rows may be strided."""
    check(q, k, cos_sin)
    num_tokens, q_heads, dim = q.shape
    half, k_heads = cos_sin.shape[1] // 2, k.shape[1]
    block = triton.next_power_of_2(half)
    heads = max(1, min(triton.next_power_of_2(max(q_heads, k_heads)), _NUMBERS // (2 * block)))
    if num_tokens:
        turn[(num_tokens, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))](
            q, k, positions, cos_sin, q.stride(0), k.stride(0), cos_sin.shape[0], Q_HEADS=q_heads, K_HEADS=k_heads, DIM=dim,
            HALF=half, HEADS=heads, BLOCK=block, num_warps=1,
        )  # fmt: skip


def check(q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Raise ValueError with the reason if the kernel cannot serve these."""
    dim, turned = q.shape[2], cos_sin.shape[1]
    for name, x in (("q", q), ("k", k)):
        if x.stride(2) != 1 or x.stride(1) != dim or x.dtype != q.dtype:
            raise ValueError(f"heads of {name} must be dense and of {q.dtype}, got strides {x.stride()} and {x.dtype}")
    if not 0 < turned <= dim or turned % 2:
        raise ValueError(f"dims that turn must be even and at most {dim}, got {turned}")
