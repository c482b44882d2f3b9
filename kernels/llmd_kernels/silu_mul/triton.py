"""A piece of one line a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SILU, GELU, GELU_TANH = 0, 1, 2


@triton.jit
def gate_up(out, x, dim, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, D] = act(x[:, :D]) · x[:, D:]."""
    line = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < dim
    g = tl.load(x + line * 2 * dim + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + line * 2 * dim + dim + i, mask=mask, other=0.0).to(tl.float32)
    if KIND == 0:
        act = g * tl.sigmoid(g)
    elif KIND == 1:
        act = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        act = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))  # (1 + tanh y) / 2 is sigmoid 2y
    tl.store(out + line * dim + i, (act * up).to(out.dtype.element_ty), mask=mask)


def activate(x: torch.Tensor, kind: int) -> torch.Tensor:
    """x [T, 2·D], contiguous → [T, D] by SILU, GELU or GELU_TANH."""
    check(x)
    num_rows, dim = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_rows, dim, dtype=x.dtype, device=x.device)
    if out.numel():
        gate_up[(num_rows, triton.cdiv(dim, _BLOCK))](out, x, dim, KIND=kind, BLOCK=_BLOCK, num_warps=4)
    return out


def check(x: torch.Tensor) -> None:
    """Raise ValueError with the reason if the kernel cannot serve x."""
    if x.dim() != 2 or x.shape[1] % 2 or not x.is_contiguous():
        raise ValueError(f"a gated activation wants contiguous [T, 2*D], got {tuple(x.shape)}, strides {x.stride()}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"a gated activation wants float32, float16 or bfloat16, got {x.dtype}")
