"""Writing keys and values, alone or together with the norm and the turning of heads that come before: one pass over q, k, v.

grid tokens × (groups of query heads + groups of KV heads)     query heads are normalised, turned and written to q's place
                                                               keys likewise, into their slots, values beside them

A group is a tile of heads for each half of the dims that turn, whose pairs then meet in one thread, and one of the dims that
do not. The cosines and sines are read once for all heads of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.quantized_kv import LayerKV
from llmd_kernels.quantized_kv.triton import eight_bits, kernel_view, scale_bits
from llmd_kernels.triton_barrier import full_barrier

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NUMBERS = 1024  # of a group of heads, for a warp: 16 bytes of each half a thread, twice
_MAX_DIM = 1 << 10


@triton.jit
def piece(x, real, START: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Dims [START, START + SIZE) of heads at x [H], in float32."""
    i = tl.arange(0, BLOCK)
    return tl.load(x[:, None] + START + i[None, :], mask=real[:, None] & (i < SIZE)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_piece(to, x, real, START: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The same dims of heads at `to` [H]."""
    i = tl.arange(0, BLOCK)
    tl.store(to[:, None] + START + i[None, :], x.to(to.dtype.element_ty), mask=real[:, None] & (i < SIZE)[None, :])


@triton.jit
def weighed(x, scale, weight, dtype: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A piece x [H, D] normalised, rounded where the separate kernels round."""
    i = tl.arange(0, BLOCK)
    w = tl.load(weight + START + i, mask=i < SIZE, other=0.0).to(tl.float32)
    return (x * scale[:, None] * w[None, :]).to(dtype).to(tl.float32)


@triton.jit
def heads_of(
    x, real, weight, cos_sin, position, eps, HAS_NORM: tl.constexpr, TURNS: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads at x [H] in their three pieces, normalised and turned as far as asked."""
    dtype: tl.constexpr = x.dtype.element_ty
    first, second = piece(x, real, 0, HALF, BLOCK), piece(x, real, HALF, HALF, BLOCK)
    rest = piece(x, real, 2 * HALF, DIM - 2 * HALF, REST)
    if HAS_NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
        scale = 1.0 / tl.sqrt(squares / DIM + eps)
        first = weighed(first, scale, weight, dtype, 0, HALF, BLOCK)
        second = weighed(second, scale, weight, dtype, HALF, HALF, BLOCK)
        rest = weighed(rest, scale, weight, dtype, 2 * HALF, DIM - 2 * HALF, REST)
    if TURNS:
        i = tl.arange(0, BLOCK)
        line = cos_sin + position * (2 * HALF) + i
        cos = tl.load(line, mask=i < HALF, other=1.0)[None, :]
        sin = tl.load(line + HALF, mask=i < HALF, other=0.0)[None, :]
        first, second = first * cos - second * sin, second * cos + first * sin
    return first, second, rest


@triton.jit
def put(
    to, scales, first, second, rest, real, KIND: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Heads in their pieces to places [H], with their scales where the cache has them."""
    if KIND != 0:
        largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=1))
        broken = tl.sum(first * 0.0, axis=1) + tl.sum(second * 0.0, axis=1) + tl.sum(rest * 0.0, axis=1)
        bits, inverse = scale_bits(largest, broken, KIND)
        tl.store(scales, bits.to(tl.int16), mask=real)
        first, second = eight_bits(first, inverse, KIND), eight_bits(second, inverse, KIND)
        rest = eight_bits(rest, inverse, KIND)
    store_piece(to, first, real, 0, HALF, BLOCK)
    store_piece(to, second, real, HALF, HALF, BLOCK)
    if 2 * HALF < DIM:
        store_piece(to, rest, real, 2 * HALF, DIM - 2 * HALF, REST)


@triton.jit(do_not_specialize_on_alignment=("positions", "slots"))
def rotate_and_store(
    q, k, v, cache, scales, positions, slots, cos_sin, q_weight, k_weight, eps, max_position, q_stride, k_stride, v_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr,
    V_OFFSET: tl.constexpr, SCALE_STRIDE: tl.constexpr, SCALE_V_OFFSET: tl.constexpr, HAS_NORM: tl.constexpr,
    TURNS: tl.constexpr, KIND: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads of q in place or, past those, of k and v into the cache."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_groups: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    position = token * 0
    if TURNS:
        position = tl.minimum(tl.maximum(tl.load(positions + token), 0), max_position - 1)
    if group < q_groups:
        head = group * HEADS + tl.arange(0, HEADS)
        real = head < Q_HEADS
        place = q + token * q_stride + head * DIM
        first, second, rest = heads_of(
            place, real, q_weight, cos_sin, position, eps, HAS_NORM, TURNS, DIM, HALF, BLOCK, REST
        )  # fmt: skip
        full_barrier()  # all is read before any is overwritten
        store_piece(place, first, real, 0, HALF, BLOCK)
        store_piece(place, second, real, HALF, HALF, BLOCK)
        if HAS_NORM and 2 * HALF < DIM:
            store_piece(place, rest, real, 2 * HALF, DIM - 2 * HALF, REST)
    else:
        head = (group - q_groups) * HEADS + tl.arange(0, HEADS)
        real = head < KV_HEADS
        slot = tl.load(slots + token)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        to = cache + block * BLOCK_STRIDE + offset * TOKEN_STRIDE + head * DIM
        scale_to = scales + block * SCALE_STRIDE + offset * KV_HEADS + head
        value = v + token * v_stride + head * DIM
        v_first, v_second = piece(value, real, 0, HALF, BLOCK), piece(value, real, HALF, HALF, BLOCK)
        v_rest = piece(value, real, 2 * HALF, DIM - 2 * HALF, REST)
        key = k + token * k_stride + head * DIM
        first, second, rest = heads_of(key, real, k_weight, cos_sin, position, eps, HAS_NORM, TURNS, DIM, HALF, BLOCK, REST)
        dtype: tl.constexpr = k.dtype.element_ty
        first, second, rest = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32), rest.to(dtype).to(tl.float32)
        put(to, scale_to, first, second, rest, real, KIND, DIM, HALF, BLOCK, REST)
        put(to + V_OFFSET, scale_to + SCALE_V_OFFSET, v_first, v_second, v_rest, real, KIND, DIM, HALF, BLOCK, REST)


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: LayerKV, slot_mapping: torch.Tensor) -> None:
    """As in the package: k, v [T, K, D] as they are."""
    _launch(k, k, v, kv, slot_mapping, slot_mapping, None, None, 0)


def rotary_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: LayerKV,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """As in the package: q in place, turned k and plain v into the cache; k itself stays as it is."""
    _launch(q, k, v, kv, positions, slot_mapping, cos_sin, norms, q.shape[1])


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: LayerKV, turned: int) -> None:
    """Raise ValueError with the reason if the kernel cannot serve these; `turned`: dims that turn."""
    dim = k.shape[2]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1 or x.stride(1) != dim:
            raise ValueError(f"heads of {name} must be dense, got strides {x.stride()}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    data = kernel_view(kv).data
    if data.stride(4) != 1 or data.stride(3) != dim:
        raise ValueError(f"heads of the cache must be dense, got strides {data.stride()}")
    if dim > _MAX_DIM:
        raise ValueError(f"head_dim must be at most {_MAX_DIM}, got {dim}")
    if turned > dim or turned % 2:
        raise ValueError(f"dims that turn must be even and at most {dim}, got {turned}")


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: LayerKV, positions: torch.Tensor, slots: torch.Tensor,
    cos_sin: torch.Tensor | None, norms: tuple[torch.Tensor, torch.Tensor, float] | None, q_heads: int,
) -> None:  # fmt: skip
    turned = 0 if cos_sin is None else cos_sin.shape[1]
    check(q, k, v, kv, turned)
    if len(slots) != len(k) or len(positions) != len(k):
        raise ValueError(f"{len(k)} tokens, but {len(slots)} slots and {len(positions)} positions")
    num_tokens, kv_heads, dim = k.shape
    cache, scales, kind, _ = kernel_view(kv)
    half = turned // 2 or dim // 2  # what does not turn is copied in halves too
    block, rest = (triton.next_power_of_2(max(1, size)) for size in (half, dim - 2 * half))
    heads = max(1, min(triton.next_power_of_2(max(q_heads, kv_heads)), _NUMBERS // (2 * block)))
    q_weight, k_weight, eps = norms or (k, k, 0.0)  # pointers that are never read stand in for none
    table = k if cos_sin is None else cos_sin
    if num_tokens:
        rotate_and_store[(num_tokens, triton.cdiv(q_heads, heads) + triton.cdiv(kv_heads, heads))](
            q, k, v, cache, scales, positions, slots, table, q_weight, k_weight, eps, table.shape[0], q.stride(0),
            k.stride(0), v.stride(0), Q_HEADS=q_heads, KV_HEADS=kv_heads, BLOCK_STRIDE=cache.stride(0),
            TOKEN_STRIDE=cache.stride(2), V_OFFSET=cache.stride(1), SCALE_STRIDE=scales.stride(0) if kind else 0,
            SCALE_V_OFFSET=scales.stride(1) if kind else 0, HAS_NORM=norms is not None, TURNS=cos_sin is not None, KIND=kind,
            BLOCK_SIZE=cache.shape[2], DIM=dim, HALF=half, HEADS=heads, BLOCK=block, REST=rest, num_warps=1,
        )  # fmt: skip
