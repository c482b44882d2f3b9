"""Experts on a GPU: pairs of token and expert are put in the experts' order, then each expert multiplies its own.

    choose    the likeliest experts of each token
    sort      pairs by expert, and blocks of at most block_m pairs of one expert each
    multiply  act(x · gateᵀ) · (x · upᵀ) for each pair, rows of gate and up taken by turns so that both are in one tile
    multiply  · downᵀ, back in the order of the tokens
    add_up    Σ weight · y over a token's pairs, in float32, in their order

Blocks that a choice leaves empty end at once. A weight is read once for all pairs of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.experts import triton_dense, triton_eights, triton_groups
from llmd_kernels.experts.table import MAX_EXPERTS, Format, keeps_sums, narrowed, shaped, tile_for
from llmd_kernels.experts.triton_sorting import Blocks, sort_pairs
from llmd_kernels.experts.triton_sorting import route as route
from llmd_kernels.experts.weights import ExpertWeights, Fp8Weight, Weight
from llmd_kernels.gpu import device_name, num_processors
from llmd_kernels.grouped_linear import GroupedWeight
from llmd_kernels.int8_linear import Int8Weight

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_WIDE = 1024  # features of a token that a program adds up


@triton.jit
def add_up(out, parts, weights, width, num_chosen, BLOCK: tl.constexpr):
    """out [T, H] = Σ weights [T, k] · parts [T, k, H], in the order of the slots."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in range(num_chosen):
        pair = token * num_chosen + slot
        total += tl.load(weights + pair) * tl.load(parts + pair * width + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(out + token * width + n, total.to(out.dtype.element_ty), mask=n < width)


@triton.jit
def gated_sum(out, y, x, gate, width, BLOCK: tl.constexpr):
    """out [T, H] = y + sigmoid(gate [T]) · x."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share = tl.sigmoid(tl.load(gate + token).to(tl.float32))
    some = tl.load(x + token * width + n, mask=n < width, other=0.0).to(tl.float32)
    total = tl.load(y + token * width + n, mask=n < width, other=0.0).to(tl.float32) + share * some
    tl.store(out + token * width + n, total.to(out.dtype.element_ty), mask=n < width)


def why_not(gate_up: ExpertWeights, down: ExpertWeights) -> str | None:
    """What keeps the kernels from these experts; None: nothing."""
    if gate_up.num_experts > MAX_EXPERTS:
        return f"{gate_up.num_experts} experts, more than {MAX_EXPERTS}"
    return _why_not(gate_up.stacked) or _why_not(down.stacked)


def _why_not(stacked: Weight | None) -> str | None:
    if stacked is None:
        return "weights that do not lie in one tensor"
    if isinstance(stacked, GroupedWeight):
        return triton_groups.why_not(stacked)
    if isinstance(stacked, Int8Weight):
        return "weights in panels" if stacked.is_in_panels else None
    if isinstance(stacked, Fp8Weight):
        return triton_eights.why_not(stacked)
    return None if stacked.dtype in triton_dense.DTYPES else f"weights of {stacked.dtype}"


def format_of(stacked: Weight | None) -> Format:
    """What the table calls it."""
    if isinstance(stacked, GroupedWeight):
        return "groups"
    return "int8" if isinstance(stacked, Int8Weight) else "fp8" if isinstance(stacked, Fp8Weight) else "dense"


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    activation: str,
) -> torch.Tensor:
    """As in the package."""
    if not (ids.is_contiguous() and weights.is_contiguous()):
        ids, weights = ids.contiguous(), weights.contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    (num_tokens, num_chosen), num_pairs, width = ids.shape, ids.numel(), down.out_features
    tile = tile_for(device_name(x.device), num_tokens, num_chosen, gate_up.num_experts, x.itemsize)
    blocks = sort_pairs(ids, gate_up.num_experts, tile)
    hidden = torch.empty(num_pairs, down.in_features, dtype=x.dtype, device=x.device)
    parts = torch.empty(num_pairs, width, dtype=torch.float32 if keeps_sums(tile) else x.dtype, device=x.device)
    multiply(hidden, x, gate_up, blocks, num_chosen, KINDS[activation])
    multiply(parts, hidden, down, blocks, num_chosen, None)
    out = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
    add_up[(num_tokens, triton.cdiv(width, _WIDE))](out, parts, weights, width, num_chosen, BLOCK=_WIDE)
    return out


def multiply(
    out: torch.Tensor, x: torch.Tensor, weights: ExpertWeights, blocks: Blocks, num_chosen: int, kind: int | None
) -> None:
    """Fill out with the pairs' products; `kind`: they are gate and up, and that is the activation."""
    stacked = weights.stacked
    tile = shaped(blocks.tile, format_of(stacked), x.itemsize)
    tile = narrowed(tile, blocks.total, weights.out_features, num_processors(x.device))
    if isinstance(stacked, torch.Tensor):
        triton_dense.launch(out, x, stacked, blocks, tile, num_chosen, kind)
    elif isinstance(stacked, GroupedWeight):
        assert weights.factors is not None
        triton_groups.launch(out, x, stacked, weights.factors, blocks, tile, num_chosen, kind)
    elif isinstance(stacked, Int8Weight):
        triton_eights.launch_int8(out, x, stacked, blocks, tile, num_chosen, kind)
    else:
        assert stacked is not None
        triton_eights.launch_fp8(out, x, stacked, weights.x_scale, blocks, tile, num_chosen, kind)


def add_gated(y: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """As in the package, all of them dense."""
    (num_tokens, width), out = y.shape, torch.empty_like(y)
    gated_sum[(num_tokens, triton.cdiv(width, _WIDE))](out, y, x, gate, width, BLOCK=_WIDE)
    return out
