"""Writing keys and values, alone or together with the norm and the turning of heads that come before: one pass over q, k, v.

grid tokens × (query heads + KV heads)     a query head is normalised, turned and written to q's place
                                           a KV head's key likewise, into its slot, its value beside it
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.quantized_kv import LayerKV
from llmd_kernels.quantized_kv.triton import kernel_view, store_quantized


@triton.jit
def head_of(x, weight, cos_sin, position, d, mask, eps, dim, half, HAS_NORM: tl.constexpr, TURNS: tl.constexpr):
    """A head [D] in float32, normalised and turned as far as asked; its partner dims are read a second time."""
    wide = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / dim + eps)
        wide = wide * scale * tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
        wide = wide.to(x.dtype.element_ty).to(tl.float32)  # rounded where the separate kernels round
    if TURNS:
        turned = d < 2 * half
        other = tl.where(d < half, d + half, d - half)
        partner = tl.load(x + other, mask=turned, other=0.0).to(tl.float32)
        if HAS_NORM:
            partner = partner * scale * tl.load(weight + other, mask=turned, other=0.0).to(tl.float32)
            partner = partner.to(x.dtype.element_ty).to(tl.float32)
        line = cos_sin + position * 2 * half + tl.where(d < half, d, d - half)
        cos, sin = tl.load(line, mask=turned, other=1.0), tl.load(line + half, mask=turned, other=0.0)
        wide = wide * cos + tl.where(d < half, -partner, partner) * sin
    return wide


@triton.jit
def put(cache, scales, x, d, mask, KIND: tl.constexpr):
    """A head [D] float32 into its place, with its scale where the cache has them."""
    if KIND == 0:
        tl.store(cache + d, x.to(cache.dtype.element_ty), mask=mask)
    else:
        store_quantized(cache, scales, x, d, mask, KIND)


@triton.jit
def rotate_and_store(
    q, k, v, cache, scales, positions, slots, cos_sin, q_weight, k_weight, eps, q_heads, kv_heads, dim, half, max_position,
    q_stride, k_stride, v_stride, block_stride, v_offset, token_stride, scale_stride, scale_v_offset,
    HAS_NORM: tl.constexpr, TURNS: tl.constexpr, KIND: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The head tl.program_id(1) of q in place or, past q_heads, a head of k and v into the cache."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    mask = d < dim
    position = token * 0
    if TURNS:
        position = tl.minimum(tl.maximum(tl.load(positions + token), 0), max_position - 1)
    if head < q_heads:
        place = q + token * q_stride + head * dim
        x = head_of(place, q_weight, cos_sin, position, d, mask, eps, dim, half, HAS_NORM, TURNS)
        tl.debug_barrier()  # every partner is read before any is overwritten
        tl.store(place + d, x.to(q.dtype.element_ty), mask=mask)
    else:
        head -= q_heads
        slot = tl.load(slots + token)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        at = block * block_stride + offset * token_stride + head * dim
        scale_at = block * scale_stride + offset * kv_heads + head
        key = head_of(
            k + token * k_stride + head * dim, k_weight, cos_sin, position, d, mask, eps, dim, half, HAS_NORM, TURNS
        )
        key = key.to(k.dtype.element_ty).to(tl.float32)
        put(cache + at, scales + scale_at, key, d, mask, KIND)
        value = tl.load(v + token * v_stride + head * dim + d, mask=mask, other=0.0).to(tl.float32)
        put(cache + v_offset + at, scales + scale_v_offset + scale_at, value, d, mask, KIND)


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: LayerKV, slot_mapping: torch.Tensor) -> None:
    """As in the package: k, v [T, K, D] as they are."""
    _launch(k, k, v, kv, slot_mapping, slot_mapping, None, None, None, 0.0, q_heads=0)


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
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    _launch(q, k, v, kv, positions, slot_mapping, cos_sin, q_weight, k_weight, eps, q_heads=q.shape[1])


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: LayerKV, positions: torch.Tensor, slots: torch.Tensor,
    cos_sin: torch.Tensor | None, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, eps: float, *, q_heads: int,
) -> None:  # fmt: skip
    num_tokens, kv_heads, dim = k.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1 or x.stride(1) != dim:
            raise ValueError(f"heads of {name} must be dense, got strides {x.stride()}")
    cache, scales, kind = kernel_view(kv)
    table = k if cos_sin is None else cos_sin  # pointers that are never read stand in for none
    rotate_and_store[(num_tokens, q_heads + kv_heads)](
        q, k, v, cache, scales, positions, slots, table, k if q_weight is None else q_weight,
        k if k_weight is None else k_weight, eps, q_heads, kv_heads, dim, 0 if cos_sin is None else cos_sin.shape[1] // 2,
        1 if cos_sin is None else cos_sin.shape[0], q.stride(0), k.stride(0), v.stride(0), cache.stride(0), cache.stride(1),
        cache.stride(2), scales.stride(0) if kind else 0, scales.stride(1) if kind else 0, HAS_NORM=k_weight is not None,
        TURNS=cos_sin is not None, KIND=kind, BLOCK_SIZE=cache.shape[2], BLOCK_D=triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip
