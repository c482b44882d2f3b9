"""One line a program, read once: a line of 16k numbers fits the registers of eight warps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_DIM = 1 << 15
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)  # before the sum: no load waits behind a barrier
    if ADD:
        added = wide + tl.load(residual + line * dim + i, mask=mask, other=0.0).to(tl.float32)
        kept = added.to(out.dtype.element_ty)  # as rounded, so that what is normalised is what is kept
        tl.store(residual + line * dim + i, kept, mask=mask)
        wide = kept.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    tl.store(out + line * dim + i, (wide * scale * w).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, D] or [T, H, D] with a dense last dim."""
    check(x, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    _launch(out, x, x, weight, eps, inner, x.stride(0), inner_stride, is_sum=False)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds x into residual in place, then normalises; both [T, D], contiguous."""
    check(x, weight, residual)
    out = torch.empty_like(x)
    _launch(out, x, residual, weight, eps, 1, x.shape[-1], 0, is_sum=True)
    return out, residual


def check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> None:
    """Raise ValueError with the reason if the kernel cannot serve these."""
    dim = x.shape[-1]
    if dim > MAX_DIM:
        raise ValueError(f"rms_norm of at most {MAX_DIM} numbers, got {dim}")
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        raise ValueError(f"rms_norm wants [T, D] or [T, H, D] with a dense last dim, got {tuple(x.shape)}, {x.stride()}")
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        raise ValueError(f"rms_norm wants float32, float16 or bfloat16, got {x.dtype} and a weight of {weight.dtype}")
    if weight.shape != (dim,) or not weight.is_contiguous():
        raise ValueError(f"rms_norm wants a dense weight [{dim}], got {tuple(weight.shape)}, {weight.stride()}")
    if residual is not None and not (x.dim() == 2 and x.is_contiguous() and residual.is_contiguous()):
        raise ValueError(f"add_rms_norm wants contiguous [T, D], got strides {x.stride()} and {residual.stride()}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"a residual of {tuple(x.shape)} {x.dtype}, not {tuple(residual.shape)} {residual.dtype}")


def _launch(
    out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, inner: int,
    outer_stride: int, inner_stride: int, *, is_sum: bool,
) -> None:  # fmt: skip
    dim = x.shape[-1]
    block = triton.next_power_of_2(dim)
    if x.numel():
        normalise[(x.numel() // dim,)](
            out, x, residual, weight, eps, inner, outer_stride, inner_stride, dim, ADD=is_sum, BLOCK=block,
            num_warps=min(16, max(1, block // 1024)),
        )  # fmt: skip
