"""The truth, in torch: whole rows, sorted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llmd_kernels.sampling import Knobs

WEIGHT_ONE = 2.0**40  # the weight of the likeliest token
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniforms(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """One float64 in [0, 1) for each pair of int64 seed and counter."""
    mixed = _mix(_mix(seeds + _GOLDEN) + _mix(counters * _GOLDEN + 1))
    return _shift(mixed, 11).to(torch.float64) * 2.0**-53


def _kept(x: torch.Tensor, amounts: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[R, V] bool: the largest entries whose amounts reach `target` [R], and all that equal the least of them."""
    values, order = x.sort(1, descending=True)
    ends = amounts.gather(1, order).cumsum(1)
    at = (ends < target.unsqueeze(1)).sum(1, keepdim=True).clamp_max_(x.shape[1] - 1)
    return x >= values.gather(1, at)


def sample(
    logits: torch.Tensor, rows: torch.Tensor, num_tokens: torch.Tensor, knobs: Knobs
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in the package."""
    x = logits.float()
    best, first = x.max(1).values, x.argmax(1)
    inverse, top_k, top_p, min_p = knobs.values[rows].unbind(1)
    relative = (x - best.unsqueeze(1)).mul_(inverse.float().unsqueeze(1)).exp_()
    weight = (relative * WEIGHT_ONE).to(torch.int64) * (relative >= min_p.float().unsqueeze(1))
    weight *= _kept(x, torch.ones_like(weight), top_k.to(torch.int64))
    total = weight.sum(1)
    share = torch.minimum((top_p * total).ceil().to(torch.int64), total)
    weight *= _kept(x, weight, share) | (top_p >= 1).unsqueeze(1)
    ends = weight.cumsum(1)
    target = (uniforms(knobs.seeds[rows], num_tokens) * ends[:, -1]).to(torch.int64)
    target = torch.minimum(target, ends[:, -1] - 1).clamp_min_(0)
    drawn = (ends <= target.unsqueeze(1)).sum(1).clamp_max_(x.shape[1] - 1)
    return torch.where(inverse == 0, first, drawn), best


def deliver(
    tokens: torch.Tensor,
    best: torch.Tensor,
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    token_ids: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """As in the package."""
    out[0] = tokens.to(torch.int32)
    out[1] = best.contiguous().view(torch.int32)
    token_ids[rows, num_tokens] = out[0]
    return out
