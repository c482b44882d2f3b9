"""The product on a GPU: bytes of W become what x is in registers, or multiply as they are where the device can.

W is the left factor: its rows fill the 64 that warp groups multiply, however few rows x has. A block of W has one scale, so
the sums of a block are scaled as a whole and added up in float32. Few rows: the depth is shared among programs, the last of
which adds up their sums in order. Grids hang on shapes alone. Devices without e4m3 find its bits in a float32's: its
exponent has a bias of 7 and a float32's 127, so that shifted bits are the value over 2^120, subnormals included.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmd_kernels.fp8_linear.tiles import BLOCK_K, tile_for
from llmd_kernels.gpu import num_processors
from llmd_kernels.grouped_linear.triton import has_ptx, num_stages
from llmd_kernels.linear.table import num_shares
from llmd_kernels.linear.triton import MAX_BLOCKS, arrivals, sum_of_shares

_LENGTHS = ("num_rows",)
_MOST_AT_ONCE = 1 << 15  # features of a token that a program holds: all of most models', so that it waits once for them
_PADDING = 128  # the most rows of x in a tile
ANY_DEVICE, BY_PTX, BY_E4M3, AS_IT_IS = 0, 1, 2, 3  # how W's bytes become what is multiplied, as in `weights`


@triton.constexpr_function
def widening(is_bf16: bool) -> str:
    """Four bytes → two pairs of 16-bit floats: bits go where they belong, all ones become a NaN, and the product with a
    power of two makes up for the exponent's other bias."""
    shift, mask, one, top = (4, 0x07F007F0, 0x00100010, 0x08000800) if is_bf16 else (1, 0x3F803F80, 0x00800080, 0x40004000)
    ones, power, kind = (15, 0x7B807B80, "bf16x2") if is_bf16 else (1, 0x5C005C00, "f16x2")
    body = ""
    for half, places in enumerate((0x1404, 0x3424)):
        body += f"""
        prmt.b32 a, $2, 0, {places:#x};
        shr.u32 b, a, {shift};
        and.b32 b, b, {mask:#x};
        add.u32 c, b, {one:#x};
        and.b32 c, c, {top:#x};
        lop3.b32 a, a, 0x80008000, b, 0xea;
        mad.lo.u32 a, c, {ones}, a;
        mov.b32 b, {power:#x};
        mov.b32 c, 0x80008000;
        fma.rn.{kind} ${half}, a, b, c;"""
    return "{ .reg .b32 a, b, c;" + body + " }"


@triton.jit
def widen(byte):
    """e4m3fn as uint8 → float32."""
    bits = byte.to(tl.uint32)
    magnitude = bits & 0x7F
    value = ((magnitude << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def weights(byte, like, WAY: tl.constexpr):
    """W's bytes as what they are multiplied as, by one of the ways below."""
    FLOAT: tl.constexpr = like.dtype.element_ty
    if WAY == 3:
        value = byte.to(tl.float8e4nv, bitcast=True)
    elif WAY == 2:  # by way of float32: what turns halves to bfloat16 at once is slow
        value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32).to(FLOAT)
    elif WAY == 1:
        pair = tl.inline_asm_elementwise(
            widening(tl.bfloat16 == FLOAT), "=r,=r,r", [byte], dtype=tl.int16, is_pure=True, pack=4
        )
        value = pair.to(FLOAT, bitcast=True)
    else:
        value = widen(byte).to(FLOAT)
    return value


@triton.jit(do_not_specialize=_LENGTHS)
def multiply(
    out, parts, arrivals, x, w, w_scale, x_scale, bias, num_rows, width, depth, x_stride, height, columns, num_blocks,
    scale_row_stride, scale_stride,
    X_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, WAY: tl.constexpr, ONE_BLOCK: tl.constexpr, EVEN: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] · (W · scale)ᵀ + bias; a block of W begins where a step of BLOCK_K does. parts [SHARES, M, N].

    X_SCALES: 0 none, 1 for each row of x, 2 for each row of a whole tile, which memory holds.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    n, m = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column, j = tl.minimum(n, width - 1), tl.minimum(m, num_rows - 1), tl.arange(0, BLOCK_K)
    weight_at = w + row.to(tl.int64)[:, None] * depth + j[None, :]
    token = x + column.to(tl.int64)[None, :] * x_stride + j[:, None]
    scale_at, scaled = w_scale + (row // height) * num_blocks, m if X_SCALES == 2 else column
    size = tl.cdiv(tl.cdiv(depth, BLOCK_K), SHARES) * BLOCK_K
    y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(share * size, tl.minimum((share + 1) * size, depth), BLOCK_K):
        inside = EVEN | (start + j < depth)
        byte = tl.load(weight_at + start, mask=inside[None, :], other=0)
        some = tl.load(token + start, mask=inside[:, None], other=0.0)
        part = tl.dot(weights(byte, x, WAY), some, input_precision="ieee")
        if ONE_BLOCK:
            y += part
        else:
            at = start // columns
            y += part * both_scales(scale_at + at, x_scale + scaled * scale_row_stride + at * scale_stride, X_SCALES)
    if ONE_BLOCK:
        y *= both_scales(scale_at, x_scale + scaled * scale_row_stride, X_SCALES)
    if SHARES == 1:
        finish(out, y, bias, n, m, num_rows, width, HAS_BIAS)
    else:
        y, is_last = sum_of_shares(parts, arrivals, y, block, share, n, m, num_rows, width, SHARES)
        if is_last:
            finish(out, y, bias, n, m, num_rows, width, HAS_BIAS)


@triton.jit
def both_scales(w_scale, x_scale, X_SCALES: tl.constexpr):
    """The scales [N, M], or [N, 1], of a block of W and of rows of x where those have them."""
    s = tl.load(w_scale)[:, None]
    if X_SCALES:
        s = s * tl.load(x_scale)[None, :]
    return s


@triton.jit
def finish(out, y, bias, n, m, num_rows, width, HAS_BIAS: tl.constexpr):
    """Store sums y [N, M] with the bias."""
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * width + n[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=(n < width)[:, None] & (m < num_rows)[None, :])


@triton.jit(do_not_specialize=_LENGTHS)
def to_e4m3(
    out, scale, x, given, num_rows, depth, x_stride, scale_stride, columns, HAS_GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [M, K] = x over its block's scale, to the nearest e4m3; scale [blocks, M] is given, or the most over 448."""
    m, block = tl.program_id(0), tl.program_id(1)
    row, place = x + m.to(tl.int64) * x_stride, out + m.to(tl.int64) * depth
    end = tl.minimum((block + 1) * columns, depth)
    if HAS_GIVEN:
        s = tl.load(given)
    else:
        top = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(block * columns, end, BLOCK):
            k = start + tl.arange(0, BLOCK)
            some = tl.load(row + k, mask=k < end, other=0.0).to(tl.float32)
            top = tl.where(some != some, float("inf"), tl.maximum(top, tl.abs(some)))
        most = tl.max(top, 0)
        s = tl.where(most == float("inf"), float("nan"), tl.maximum(most / 448.0, 1.1754943508222875e-38))
    for start in range(block * columns, end, BLOCK):
        k = start + tl.arange(0, BLOCK)
        ratio = tl.load(row + k, mask=k < end, other=0.0).to(tl.float32) / s
        ratio = tl.minimum(tl.maximum(ratio, -448.0), 448.0)
        power = (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        magic = tl.maximum(power, 0.015625) * 1572864.0  # adding this leaves three bits behind the first, halves to even
        tl.store(place + k, ((ratio + magic) - magic).to(out.dtype.element_ty), mask=k < end)
    tl.store(scale + block * scale_stride + m, s)


def why_not(columns: int, depth: int) -> str | None:
    """What keeps the kernel from W's blocks of so many columns; None: nothing."""
    return None if columns >= depth or columns % BLOCK_K == 0 else f"blocks of {columns} columns, no multiple of {BLOCK_K}"


def quantize(
    x: torch.Tensor, columns: int, x_scale: torch.Tensor | None, num_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] as e4m3, or as e4m3 values in x's dtype on devices without, and float32 scales [M, num_blocks].

    One scale for each `columns` features of a token, or for all what `x_scale` says.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    num_rows, depth = x.shape
    out = torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn if has_e4m3(x.device) else x.dtype, device=x.device)
    blocks, padded = -(-depth // columns), -(-num_rows // _PADDING) * _PADDING
    scale = torch.empty(blocks, padded, dtype=torch.float32, device=x.device)
    block = min(_MOST_AT_ONCE, triton.next_power_of_2(columns))
    if num_rows:
        to_e4m3[(num_rows, blocks)](
            out, scale, x, x_scale, num_rows, depth, x.stride(0), padded, columns,
            HAS_GIVEN=x_scale is not None, BLOCK=block, num_warps=max(1, min(16, block // 1024)),
        )  # fmt: skip
    return out, scale.expand(num_blocks, padded)[:, :num_rows].t()


def has_e4m3(device: torch.device) -> bool:
    """Whether the device multiplies and converts it."""
    return has_ptx(device) and torch.cuda.get_device_capability(device) >= (8, 9)


def linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    grid: torch.Tensor,
    height: int,
    columns: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [M, K], x_scale [M, column blocks], dense or as `quantize` gives it → [M, N] in `out_dtype`, by default x's."""
    if x.stride(1) != 1:
        x = x.contiguous()
    (num_rows, depth), width, device = x.shape, weight.shape[0], x.device
    tile, way = tile_for(num_rows), way_for(x, is_scaled=x_scale is not None)
    out = torch.empty(num_rows, width, dtype=out_dtype or x.dtype, device=device)
    if not out.numel():
        return out
    blocks, blocks_m = triton.cdiv(width, tile.block_n), triton.cdiv(num_rows, tile.block_m)
    most = tile.shares if blocks_m == 1 and blocks <= MAX_BLOCKS else 1
    shares = num_shares(most, blocks, triton.cdiv(depth, BLOCK_K), num_processors(device))
    parts = torch.empty(shares, num_rows, width, dtype=torch.float32, device=device) if shares > 1 else out
    strides = (0, 0) if x_scale is None else x_scale.stride()
    is_padded = strides[0] == 1 and strides[1] % _PADDING == 0 and strides[1] >= blocks_m * tile.block_m
    flags: dict[str, Any] = {
        "X_SCALES": 0 if x_scale is None else 2 if is_padded else 1, "HAS_BIAS": bias is not None, "WAY": way,
        "ONE_BLOCK": grid.shape[1] == 1, "EVEN": depth % BLOCK_K == 0, "SHARES": shares, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "BLOCK_K": BLOCK_K, "num_warps": tile.warps, "num_stages": num_stages(tile.stages, device),
    }  # fmt: skip
    multiply[(blocks, shares, blocks_m)](
        out, parts, arrivals(device), x.to(torch.float8_e4m3fn) if way == AS_IT_IS else x, weight.view(torch.uint8), grid,
        grid if x_scale is None else x_scale, bias, num_rows, width, depth, x.stride(0), height, columns, grid.shape[1],
        *strides, **flags,
    )  # fmt: skip
    return out


def linear_of_e4m3(
    x: torch.Tensor,
    step: int,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    grid: torch.Tensor,
    height: int,
    columns: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The same with x made e4m3 first, with a scale for each `step` of its columns or with the given one."""
    rounded, scales = quantize(x, step, x_scale, grid.shape[1])
    return linear(rounded, scales, weight, grid, height, columns, bias, x.dtype)


def way_for(x: torch.Tensor, *, is_scaled: bool) -> int:
    """How W is widened for x, e4m3 values themselves where they are scaled."""
    if has_e4m3(x.device):
        return AS_IT_IS if is_scaled else BY_E4M3
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return BY_PTX if is_half and has_ptx(x.device) else ANY_DEVICE
