"""The product on a GPU, and the layout it reads: W becomes what x is in registers, right where the product takes it.

W lies in chunks of 64 input features, all rows of a chunk side by side, so that a tile is one stretch of memory. A chunk's
two halves of 32 features share bytes (4 bits: low and high) or follow each other (8 bits); each half is multiplied by its
own columns of x, so nothing is interleaved.

W is the left factor. Its integers are multiplied as they are, and a group's sums are scaled as a whole, in float32: with
scale s and offset o, Σ (q s + o) x = s Σ q x + o Σ x. So a weight costs its widening alone: four bits beside the exponent of
128 (bfloat16) or 1024 (float16) are a float that much too large, which goes into the offset. Σ x is a product with ones that
the tensor cores do beside the other, or for many rows a kernel of its own.

Few rows: the chunks are split among programs, the last of which adds up their sums in order. Grids hang on shapes alone,
sums on neither the other rows nor the time: a row is the same in every batch of one kind of tile. Groups that are no
whole halves of a chunk, and for many rows those that are no whole chunks, have their weights scaled one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from llmd_kernels.grouped_linear.tiles import ONE_BY_ONE, tile_for
from llmd_kernels.linear.triton import MAX_BLOCKS, arrivals, sum_of_shares

if TYPE_CHECKING:
    from llmd_kernels.grouped_linear import GroupedWeight

_HALF = 32
_CHUNK = 2 * _HALF
_LENGTHS = ("num_rows",)
_MOST_ROWS_WITH_ONES = 64  # of x: above, its sums are worth a kernel of their own
_MOST_ROWS_APART = 32  # tiles.py has two warps for up to so many
LIFTS = {torch.bfloat16: 128, torch.float16: 1024}  # by how much `widening` makes integers too large


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K] → uint8 [chunks, N, 32 or 64]."""
    halves = F.pad(q, (0, -q.shape[1] % _CHUNK)).view(q.shape[0], -1, 2, _HALF).transpose(0, 1)
    if bits == 4:
        return (halves[:, :, 0] | (halves[:, :, 1] << 4)).contiguous()
    return halves.flatten(2).contiguous()


def unpack(packed: torch.Tensor, bits: int, depth: int) -> torch.Tensor:
    """Back to uint8 [N, K]."""
    chunks = torch.cat((packed & 15, packed >> 4), dim=2) if bits == 4 else packed
    return chunks.transpose(0, 1).flatten(1)[:, :depth]


@triton.constexpr_function
def widening(is_bf16: bool) -> str:
    """Four bytes → their four low halves and their four high halves, each 128 or 1024 too large, as pairs of 16 bits."""
    magic = "0x43004300" if is_bf16 else "0x64006400"
    return f"""{{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.u32 c, a, 4;
        shr.u32 d, b, 4;
        lop3.b32 $0, a, 0x000f000f, {magic}, 0xea;
        lop3.b32 $1, b, 0x000f000f, {magic}, 0xea;
        lop3.b32 $2, c, 0x000f000f, {magic}, 0xea;
        lop3.b32 $3, d, 0x000f000f, {magic}, 0xea;
    }}"""


@triton.jit
def halves(w, chunk, n, width, like, BITS: tl.constexpr, PTX: tl.constexpr, HALF: tl.constexpr):
    """The halves of a chunk of W for outputs n, [N, HALF] each in `like`'s dtype; of 4 bits as much too large as above."""
    j = tl.arange(0, HALF)
    FLOAT: tl.constexpr = like.dtype.element_ty
    if BITS == 8:
        place = w + chunk.to(tl.int64) * width * 2 * HALF + n[:, None] * (2 * HALF) + j[None, :]
        first, second = tl.load(place).to(FLOAT), tl.load(place + HALF).to(FLOAT)
    else:
        byte = tl.load(w + chunk.to(tl.int64) * width * HALF + n[:, None] * HALF + j[None, :])
        if PTX:
            first, second = tl.inline_asm_elementwise(
                widening(tl.bfloat16 == FLOAT), "=r,=r,=r,=r,r", [byte], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
            )
            first, second = first.to(FLOAT, bitcast=True), second.to(FLOAT, bitcast=True)
        else:
            first, second = (byte & 15).to(FLOAT), (byte >> 4).to(FLOAT)
    return first, second


@triton.jit
def add_group(
    y, part, total, scale, offset, sums, group, n, m, width, sums_stride, lift,
    HAS_OFFSET: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """y + a group's sums, scaled, and its offset times the sums of x; `lift` is how much too large W's integers were."""
    s = tl.load(scale + group * width + n).to(tl.float32)
    o = -lift * s
    if HAS_OFFSET:
        o += tl.load(offset + group * width + n).to(tl.float32)
    if HAS_SUMS:
        total = tl.load(sums + group * sums_stride + m)[None, :]
    return y + part * s[:, None] + total * o[:, None]


@triton.jit(do_not_specialize=_LENGTHS)
def multiply(
    out, parts, arrivals, x, w, scale, offset, sums, bias, factor, lift, num_rows, width, depth, x_stride, sums_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr, TWICE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] · Wᵀ + bias in steps of CHUNKS; GROUP features share a scale, 0: all. parts [SPLIT, M, N].

    TWICE: what multiplies ones is copied apart, for it must lie differently where warps multiply each for itself.
    """
    block, share, num_groups = tl.program_id(0), tl.program_id(1), tl.cdiv(depth, GROUP) if GROUP else 1
    n, m = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column, j = tl.minimum(n, width - 1), tl.minimum(m, num_rows - 1), tl.arange(0, HALF)
    token = x + column.to(tl.int64)[None, :] * x_stride + j[:, None]
    ones = tl.full((BLOCK_N, HALF), 1.0, dtype=x.dtype.element_ty)
    y, none = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32), tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    steps = tl.cdiv(depth, 2 * HALF * CHUNKS)
    size = tl.cdiv(steps, SPLIT)
    for step in range(share * size, tl.minimum((share + 1) * size, steps)):
        part, total = none, none
        for c in tl.static_range(CHUNKS):
            chunk = step * CHUNKS + c
            pair = halves(w, chunk, row, width, x, BITS, PTX, HALF)
            for half in tl.static_range(2):
                k = chunk * 2 * HALF + half * HALF
                inside = EVEN | (k + j < depth)[:, None]
                some = tl.load(token + k, mask=inside, other=0.0)
                part = tl.dot(pair[half], some, part, input_precision="ieee")
                if not HAS_SUMS:
                    if TWICE:
                        some = tl.load(token + k, mask=inside, other=0.0, eviction_policy="evict_last")
                    total = tl.dot(ones, some, total, input_precision="ieee")
                if GROUP % (2 * HALF) or (half == 1 and c == CHUNKS - 1):
                    group = tl.minimum(k // GROUP, num_groups - 1) if GROUP else 0
                    y = add_group(
                        y, part, total, scale, offset, sums, group, row, m, width, sums_stride, lift, HAS_OFFSET,
                        HAS_SUMS,
                    )  # fmt: skip
                    part, total = none, none
    y *= factor
    if SPLIT == 1:
        finish(out, y, bias, n, m, num_rows, width, HAS_BIAS)
    else:
        y, is_last = sum_of_shares(parts, arrivals, y, block, share, n, m, num_rows, width, SPLIT)
        if is_last:
            finish(out, y, bias, n, m, num_rows, width, HAS_BIAS)


@triton.jit
def finish(out, y, bias, n, m, num_rows, width, HAS_BIAS: tl.constexpr):
    """Store sums y [N, M] with the bias."""
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * width + n[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=(n < width)[:, None] & (m < num_rows)[None, :])


@triton.jit(do_not_specialize=_LENGTHS)
def add_up(sums, x, num_rows, depth, x_stride, sums_stride, group_size, BLOCK: tl.constexpr):
    """sums [groups, M] = the sums of x [M, K] over each group."""
    m, group = tl.program_id(0), tl.program_id(1)
    end = tl.minimum((group + 1) * group_size, depth)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(group * group_size, end, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(x + m.to(tl.int64) * x_stride + k, mask=k < end, other=0.0).to(tl.float32)
    tl.store(sums + group * sums_stride + m, tl.sum(total, 0))


@triton.jit
def half_chunk(
    w, scale, offset, n, chunk, part: tl.constexpr, width, depth, group_size, zero, factor,
    BITS: tl.constexpr, EVEN: tl.constexpr, HAS_OFFSET: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Half a chunk of W for columns n of the output: float32 [HALF, N]."""
    j = tl.arange(0, HALF)
    k = chunk * 2 * HALF + part * HALF + j
    if BITS == 4:
        place = (chunk * width + n).to(tl.int64)[None, :] * HALF + j[:, None]
        byte = tl.load(w + place, mask=(n < width)[None, :], other=0)
        q = (byte & 15) if part == 0 else (byte >> 4)
    else:
        place = (chunk * width + n).to(tl.int64)[None, :] * 2 * HALF + part * HALF + j[:, None]
        q = tl.load(w + place, mask=(n < width)[None, :], other=0)
    if EVEN:  # one group: one vector of scales
        group = (chunk * 2 * HALF + part * HALF) // group_size
        at, mask = (group * width + n)[None, :], ((n < width) & (group * group_size < depth))[None, :]
    else:
        at, mask = (k // group_size)[:, None] * width + n[None, :], (k < depth)[:, None] & (n < width)[None, :]
    value = (q.to(tl.float32) - zero) * (tl.load(scale + at, mask=mask, other=0.0).to(tl.float32) * factor)
    if HAS_OFFSET:
        value += tl.load(offset + at, mask=mask, other=0.0).to(tl.float32) * factor
    return value


@triton.jit(do_not_specialize=_LENGTHS)
def multiply_one_by_one(
    out, x, w, scale, offset, bias, factor, num_rows, width, depth, x_stride, group_size, zero,
    BITS: tl.constexpr, EVEN: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] · Wᵀ + bias, for groups of any size; EVEN: no half of a chunk has two."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, HALF)
    row = x + m.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for chunk in range(tl.cdiv(depth, 2 * HALF)):
        for part in tl.static_range(2):
            k = chunk * 2 * HALF + part * HALF + j
            some = tl.load(row + k[None, :], mask=(m < num_rows)[:, None] & (k < depth)[None, :], other=0.0)
            weight = half_chunk(
                w, scale, offset, n, chunk, part, width, depth, group_size, zero, factor, BITS, EVEN, HAS_OFFSET, HALF
            )
            acc = tl.dot(some, weight.to(some.dtype), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < num_rows)[:, None] & (n < width)[None, :])


def linear(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], weight in chunks, bias [N] → [M, N] in x's dtype."""
    if weight.columns is not None:
        x = x.index_select(1, weight.columns)
    elif x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    has_one_group = weight.group_size >= x.shape[1]
    is_even = weight.group_size % _HALF == 0 or has_one_group
    has_whole_chunks = weight.group_size % _CHUNK == 0 or has_one_group
    if has_whole_chunks or (is_even and x.shape[0] <= _MOST_ROWS_WITH_ONES):
        _multiply(out, x, weight, bias)
    else:
        _multiply_one_by_one(out, x, weight, bias, is_even=is_even)
    return out


def _multiply(out: torch.Tensor, x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> None:
    (num_rows, depth), width, device = x.shape, weight.out_features, x.device
    num_chunks = triton.cdiv(depth, _CHUNK)
    tile = tile_for(num_rows, width, num_chunks)
    group = 0 if weight.group_size >= depth else weight.group_size
    blocks, blocks_m = triton.cdiv(width, tile.block_n), triton.cdiv(num_rows, tile.block_m)
    split = tile.split if blocks_m == 1 and blocks <= MAX_BLOCKS else 1
    parts = torch.empty(split, num_rows, width, dtype=torch.float32, device=device) if split > 1 else out
    flags = constants(weight.bits, group, num_chunks, x, num_rows)
    sums = _sums(x, group or depth, blocks_m * tile.block_m) if flags["HAS_SUMS"] else out
    lift = LIFTS[x.dtype] if flags["PTX"] and weight.bits == 4 else 0
    multiply[(blocks, split, blocks_m)](
        out, parts, arrivals(device), x, weight.packed, weight.scale, weight.offset, sums, bias, weight.factor,
        float(lift + (0 if weight.offset is not None else weight.zero)), num_rows, width, depth, x.stride(0), sums.stride(0),
        HAS_OFFSET=weight.offset is not None, HAS_BIAS=bias is not None, EVEN=depth % _CHUNK == 0, SPLIT=split,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps, num_stages=num_stages(tile.stages, device),
        **flags,
    )  # fmt: skip


def constants(bits: int, group: int, num_chunks: int, x: torch.Tensor, num_rows: int) -> dict[str, Any]:
    """How W is read: two chunks a step where a group has them; `group` 0: all features share a scale."""
    return {
        "BITS": bits, "GROUP": group, "CHUNKS": 2 if group % (2 * _CHUNK) == 0 and num_chunks % 2 == 0 else 1,
        "HAS_SUMS": num_rows > _MOST_ROWS_WITH_ONES, "PTX": has_ptx(x.device) and x.dtype in LIFTS,
        "TWICE": num_rows <= _MOST_ROWS_APART, "HALF": _HALF,
    }  # fmt: skip


def has_ptx(device: torch.device) -> bool:
    """Whether its compiler takes NVIDIA's instructions."""
    return device.type == "cuda" and torch.version.hip is None


def num_stages(wanted: int, device: torch.device) -> int:
    """Copies ahead, of which AMD's shared memory holds one beside the present."""
    return wanted if has_ptx(device) else min(wanted, 2)


def _sums(x: torch.Tensor, group_size: int, stride: int) -> torch.Tensor:
    """[groups, stride] float32, the sums of each row of x over each group; what is behind the rows means nothing."""
    num_rows, depth = x.shape
    sums = torch.empty(triton.cdiv(depth, group_size), stride, dtype=torch.float32, device=x.device)
    block = min(1024, triton.next_power_of_2(group_size))
    add_up[(num_rows, len(sums))](
        sums, x, num_rows, depth, x.stride(0), stride, group_size, BLOCK=block, num_warps=1 if block < 512 else 4
    )
    return sums


def _multiply_one_by_one(
    out: torch.Tensor, x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None, *, is_even: bool
) -> None:
    (num_rows, depth), width = x.shape, weight.out_features
    tile = next(tile for most, tile in ONE_BY_ONE if num_rows <= most)
    multiply_one_by_one[(triton.cdiv(width, tile.block_n), triton.cdiv(num_rows, tile.block_m))](
        out, x, weight.packed, weight.scale, weight.offset, bias, weight.factor, num_rows, width, depth, x.stride(0),
        weight.group_size, 0 if weight.offset is not None else weight.zero, BITS=weight.bits, EVEN=is_even,
        HAS_OFFSET=weight.offset is not None, HAS_BIAS=bias is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        HALF=_HALF, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
