"""One line a program, read once: a line of 16k numbers fits the registers of eight warps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_DIM = 1 << 15


@triton.jit
def normalise(
    out, x, residual, weight, eps, inner, outer_stride, inner_stride, dim, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[i] = x[i] / rms(x[i]) · weight; with ADD residual[i] becomes x[i] + residual[i] first, and that is normalised."""
    line = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < dim
    start = line // inner * outer_stride + line % inner * inner_stride
    wide = tl.load(x + start + i, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        added = wide + tl.load(residual + line * dim + i, mask=mask, other=0.0).to(tl.float32)
        kept = added.to(out.dtype.element_ty)  # as rounded, so that what is normalised is what is kept
        tl.store(residual + line * dim + i, kept, mask=mask)
        wide = kept.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + line * dim + i, (wide * scale * w).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, D] or [T, H, D] with a dense last dim."""
    check(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    _launch(out, x, x, weight, eps, inner, x.stride(0), inner_stride, is_sum=False)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds x into residual in place, then normalises; both [T, D], contiguous."""
    check(x)
    out = torch.empty_like(x)
    _launch(out, x, residual, weight, eps, 1, x.shape[-1], 0, is_sum=True)
    return out, residual


def check(x: torch.Tensor) -> None:
    """Raise ValueError with the reason if the kernel cannot serve x."""
    if x.shape[-1] > MAX_DIM:
        raise ValueError(f"rms_norm of at most {MAX_DIM} numbers, got {x.shape[-1]}")
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        raise ValueError(f"rms_norm wants [T, D] or [T, H, D] with a dense last dim, got {tuple(x.shape)}, {x.stride()}")


def _launch(
    out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, inner: int,
    outer_stride: int, inner_stride: int, *, is_sum: bool,
) -> None:  # fmt: skip
    dim = x.shape[-1]
    block = triton.next_power_of_2(dim)
    normalise[(x.numel() // dim,)](
        out, x, residual, weight, eps, inner, outer_stride, inner_stride, dim, ADD=is_sum, BLOCK=block,
        num_warps=min(16, max(1, block // 1024)),
    )  # fmt: skip
