"""Few rows of x on a GPU: one pass over W as fast as memory gives it, by one of two kernels, with what follows in the same.

`fma` reads W by 128 bits a thread straight into registers, four or more loads before the first is needed: for one row or
two, where every output gets a program soon enough without its depth being split. `mma` takes W as the left factor of the
tensor cores' product, so that its rows fill the 64 that they multiply at least, and x, padded to 16 rows, is the narrow one:
copies to shared memory run stages ahead, and what is left to do is less than an instruction a byte. Where outputs are too
few to fill a device, programs share the depth: each writes its sums, and the last to arrive adds them up in order.

Sums hang on W's shape and the table's entry for the number of rows alone: no atomic adds up floats, a row hangs on no other.
Grids hang on the same, so that graphs capture. One stream at a time may run this: the counters of arrivals are shared.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from llmd_kernels.gpu import num_processors
from llmd_kernels.linear.table import Tile, num_shares
from llmd_kernels.triton_barrier import full_barrier

PLAIN, SILU, GELU, GELU_TANH = -1, 0, 1, 2  # as kinds of llmd_kernels.silu_mul.triton
MAX_BLOCKS = 1 << 14  # of outputs whose depth is shared: arrivals are counted for each
_LENGTHS = ("num_rows",)


@triton.jit
def rows_of_block(block, width, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows of W of a block: one after another, or gates and then the ups that belong to them."""
    i = tl.arange(0, BLOCK_N)
    if KIND == -1:
        n = block * BLOCK_N + i
    else:
        n = block * (BLOCK_N // 2) + i % (BLOCK_N // 2) + (i // (BLOCK_N // 2)) * (width // 2)
    return n


@triton.jit
def low(pair, IS_BF16: tl.constexpr):
    """The first of two 16-bit floats in an int32, as float32."""
    if IS_BF16:
        value = (pair << 16).to(tl.float32, bitcast=True)
    else:
        value = pair.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def high(pair, IS_BF16: tl.constexpr):
    """The second."""
    if IS_BF16:
        value = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        value = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def finish(
    out, y, bias, block, n, m, num_rows, width,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store a block's sums y [BLOCK_N, BLOCK_M] with the bias, gated where there is a kind."""
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    if KIND == -1:
        columns, j = width, n
    else:
        columns, j = width // 2, block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        g, up = tl.split(y.reshape(2, BLOCK_N // 2, BLOCK_M).permute(1, 2, 0))
        if KIND == 0:
            y = g * tl.sigmoid(g) * up
        elif KIND == 1:
            y = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)) * up
        else:
            y = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * up
    place = m.to(tl.int64)[None, :] * columns + j[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=(j < columns)[:, None] & (m < num_rows)[None, :])


@triton.jit
def sum_of_shares(parts, arrivals, y, block, share, n, m, num_rows, width, SHARES: tl.constexpr):
    """Store a share's sums y for outputs n and rows m; the last program to do so gets the sum of all shares, and True."""
    place = m.to(tl.int64)[None, :] * width + n[:, None]
    inside = (n < width)[:, None] & (m < num_rows)[None, :]
    layer = num_rows.to(tl.int64) * width
    tl.store(parts + share * layer + place, y, mask=inside)
    full_barrier()  # all threads' sums are stored before one counts this program
    is_last = tl.atomic_add(arrivals + block, 1, sem="acq_rel") == SHARES - 1
    if is_last:
        y = tl.zeros_like(y)
        for other in range(SHARES):
            y += tl.load(parts + other * layer + place, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(arrivals + block, 0)  # for the next launch
    return y, is_last


@triton.jit
def fma(
    out, x, w, bias, width, depth, x_stride, w_stride,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [ROWS, N] = x · Wᵀ + bias for one row or two; 16-bit floats are read in pairs, so that each takes one
    instruction to widen."""
    IS_BF16: tl.constexpr = w.dtype.element_ty == tl.bfloat16
    PAIRS: tl.constexpr = BLOCK_K // 2
    n, k = rows_of_block(tl.program_id(0), width, KIND, BLOCK_N), tl.arange(0, PAIRS)
    row = w.to(tl.pointer_type(tl.int32)) + tl.minimum(n, width - 1).to(tl.int64)[:, None] * (w_stride // 2)
    tokens = x.to(tl.pointer_type(tl.int32))
    first, second = tl.zeros((BLOCK_N, PAIRS), dtype=tl.float32), tl.zeros((BLOCK_N, PAIRS), dtype=tl.float32)
    for start in range(0, depth // 2, PAIRS):
        at = start + k
        inside = EVEN | (at < depth // 2)
        weight = tl.load(row + at[None, :], mask=inside[None, :], other=0, eviction_policy="evict_first")
        some = tl.load(tokens + at, mask=inside, other=0)[None, :]
        first += low(weight, IS_BF16) * low(some, IS_BF16)
        first += high(weight, IS_BF16) * high(some, IS_BF16)
        if ROWS == 2:
            some = tl.load(tokens + x_stride // 2 + at, mask=inside, other=0)[None, :]
            second += low(weight, IS_BF16) * low(some, IS_BF16)
            second += high(weight, IS_BF16) * high(some, IS_BF16)
    if ROWS == 2:  # noqa: SIM108 (one side is not compiled)
        y = tl.join(tl.sum(first, 1), tl.sum(second, 1))
    else:
        y = tl.sum(first, 1)[:, None]
    finish(out, y, bias, tl.program_id(0), n, tl.arange(0, ROWS), ROWS, width, KIND, HAS_BIAS, BLOCK_N, ROWS)


@triton.jit(do_not_specialize=_LENGTHS)
def mma(
    out, parts, arrivals, x, w, bias, num_rows, width, depth, x_stride, w_stride,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, SHARES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x · Wᵀ + bias for up to BLOCK_M rows; parts [SHARES, M, N] and arrivals where the depth is shared."""
    block, share = tl.program_id(0), tl.program_id(1)
    n, m, k = rows_of_block(block, width, KIND, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    row = w + tl.minimum(n, width - 1).to(tl.int64)[:, None] * w_stride  # what is beyond the ends is read, not kept
    token = x + tl.minimum(m, num_rows - 1).to(tl.int64)[None, :] * x_stride
    size = tl.cdiv(tl.cdiv(depth, BLOCK_K), SHARES) * BLOCK_K
    y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(share * size, tl.minimum((share + 1) * size, depth), BLOCK_K):
        at = start + k
        if EVEN:
            weight, some = tl.load(row + at[None, :], eviction_policy="evict_first"), tl.load(token + at[:, None])
        else:
            weight = tl.load(row + at[None, :], mask=(at < depth)[None, :], other=0.0, eviction_policy="evict_first")
            some = tl.load(token + at[:, None], mask=(at < depth)[:, None], other=0.0)
        y = tl.dot(weight, some, y, input_precision="ieee")
    if SHARES == 1:
        finish(out, y, bias, block, n, m, num_rows, width, KIND, HAS_BIAS, BLOCK_N, BLOCK_M)
    else:
        y, is_last = sum_of_shares(parts, arrivals, y, block, share, n, m, num_rows, width, SHARES)
        if is_last:
            finish(out, y, bias, block, n, m, num_rows, width, KIND, HAS_BIAS, BLOCK_N, BLOCK_M)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype, tile: Tile, kind: int = PLAIN
) -> torch.Tensor:
    """x [M, K], weight [N, K], M up to tile.block_m → [M, N]; with a kind W is gates and ups, and act(gate) · up [M, N / 2].

    Raises ValueError for rows of W that do not lie at even places, dense, and for more rows of x than the tile has.
    """
    (num_rows, depth), width = x.shape, weight.shape[0]
    if why := why_not(weight):
        raise ValueError(f"a pass over the weight wants {why}, got {list(weight.shape)} with strides {weight.stride()}")
    if num_rows > tile.block_m or not num_rows:
        raise ValueError(f"a tile of {tile.block_m} rows does not hold {num_rows}")
    if x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
        x = x.contiguous()
    out = torch.empty(num_rows, width if kind == PLAIN else width // 2, dtype=out_dtype, device=x.device)
    blocks = triton.cdiv(2 * out.shape[1] if kind != PLAIN else width, tile.block_n)
    flags: dict[str, Any] = {
        "KIND": kind, "HAS_BIAS": bias is not None, "EVEN": depth % tile.block_k == 0, "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tile.block_m <= 2:
        fma[(blocks,)](out, x, weight, bias, width, depth, x.stride(0), weight.stride(0), ROWS=num_rows, **flags)
        return out
    most = tile.shares if blocks <= MAX_BLOCKS else 1
    shares = num_shares(most, blocks, triton.cdiv(depth, tile.block_k), num_processors(x.device))
    parts = torch.empty(shares, num_rows, width, dtype=torch.float32, device=x.device) if shares > 1 else out
    mma[(blocks, shares)](
        out, parts, arrivals(x.device), x, weight, bias, num_rows, width, depth, x.stride(0), weight.stride(0),
        SHARES=shares, BLOCK_M=tile.block_m, **flags,
    )  # fmt: skip
    return out


def why_not(weight: torch.Tensor) -> str | None:
    """What a weight lacks for pairs of its columns to be read at once; None: nothing."""
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return "16-bit floats"
    if weight.stride(1) != 1 or weight.stride(0) % 2 or weight.shape[1] % 2 or weight.storage_offset() % 2:
        return "dense rows at even places"
    return None


@cache
def arrivals(device: torch.device) -> torch.Tensor:
    """Programs that have stored their sums, by block of outputs; all 0 between launches."""
    return torch.zeros(MAX_BLOCKS, dtype=torch.int32, device=device)
