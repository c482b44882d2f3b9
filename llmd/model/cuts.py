"""Drawing under top_k, top_p and min_p: find the smallest logit that stays, then draw among what is left.

As in vLLM, min_p comes first, top_k counts over all tokens, and top_p is a share of what those two left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmd.model.draw import first_max, largest, pick, pick_among, probabilities, slices, value_reaching, weights

_CANDIDATES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """What P rows ask. The flags say on the host whether any of them does."""

    inverse_temperature: Tensor  # [P] float32
    top_k: Tensor  # [P] int64; the vocabulary's size where it is off
    top_p: Tensor  # [P] float64
    min_p: Tensor  # [P] float32
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool

    def take(self, index: Tensor | slice) -> Cuts:
        """Those of some rows."""
        return Cuts(
            inverse_temperature=self.inverse_temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            min_p=self.min_p[index],
            any_top_k=self.any_top_k,
            any_top_p=self.any_top_p,
            any_min_p=self.any_min_p,
        )


def draw_cut(x: Tensor, cuts: Cuts, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of x [P, V] float32; also the largest logit (NaN where there is one)."""
    best, _ = first_max(x)
    if x.device.type != "cpu":
        return draw_from_rows(x, best, cuts, uniform), best
    tokens, is_final = draw_from_candidates(x, best, cuts, uniform)
    if not is_final.all():  # a look at a CPU tensor costs nothing
        open_rows = (~is_final).nonzero().squeeze(1)
        tokens[open_rows] = draw_from_rows(x[open_rows], best[open_rows], cuts.take(open_rows), uniform[open_rows])
    return tokens, best


def _share(top_p: Tensor, total: Tensor) -> Tensor:
    """The weight that top_p must cover, rounded up. All tokens where it is 1."""
    share = (top_p * total.to(torch.float64)).ceil().to(torch.int64)
    return torch.where(top_p < 1, torch.minimum(share, total), total)


def draw_from_rows(x: Tensor, best: Tensor, cuts: Cuts, uniform: Tensor) -> Tensor:
    """Exact for all rows, over whole rows."""
    parts = [_draw_slice(x[part], best[part], cuts.take(part), uniform[part]) for part in slices(x)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _draw_slice(x: Tensor, best: Tensor, cuts: Cuts, uniform: Tensor) -> Tensor:
    weight = _weights_above_min_p(x, best, cuts)
    if cuts.any_top_k:
        threshold = value_reaching(x, torch.ones_like(weight), cuts.top_k)
        weight.mul_(x >= threshold.unsqueeze(1))
    if cuts.any_top_p:
        threshold = value_reaching(x, weight, _share(cuts.top_p, weight.sum(1)))
        weight.mul_(x >= threshold.unsqueeze(1))
    return pick(weight, uniform)


def _weights_above_min_p(x: Tensor, best: Tensor, cuts: Cuts) -> Tensor:
    relative = probabilities(x, best, cuts.inverse_temperature)
    if not cuts.any_min_p:
        return weights(relative)
    return weights(relative).mul_(relative >= cuts.min_p.unsqueeze(1))


def draw_from_candidates(x: Tensor, best: Tensor, cuts: Cuts, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens, from the few largest logits; [P] bool: whether they sufficed (the others' tokens mean nothing)."""
    values, ids = largest(x, _CANDIDATES)
    relative = probabilities(values, best, cuts.inverse_temperature)
    weight = weights(relative)
    kept = (relative >= cuts.min_p.unsqueeze(1)) & (weight > 0)
    width = values.shape[1]
    kth = values.gather(1, cuts.top_k.clamp_max(width).unsqueeze(1) - 1)
    kept &= (values >= kth) | (cuts.top_k >= x.shape[1]).unsqueeze(1)
    is_final = (cuts.top_k <= width) | (cuts.top_k >= x.shape[1])
    weight.mul_(kept)
    if cuts.any_top_p:
        ends = weight.cumsum(1)
        total = _total(x, best, cuts, ends[:, -1], kept[:, -1])
        at = (ends < _share(cuts.top_p, total).unsqueeze(1)).sum(1, keepdim=True)
        kept &= values >= values.gather(1, at.clamp_max(width - 1))
        weight.mul_(kept)
    # A candidate that was dropped proves that no token beyond the candidates stays.
    is_final &= ~kept[:, -1] | (width == x.shape[1])
    return pick_among(ids, weight, uniform), is_final


def _total(x: Tensor, best: Tensor, cuts: Cuts, of_candidates: Tensor, goes_on: Tensor) -> Tensor:
    """The weight that min_p and top_k leave, from the whole row where it may go on behind the candidates. [P]"""
    if not goes_on.any():
        return of_candidates
    parts = [_weights_above_min_p(x[part], best[part], cuts.take(part)).sum(1) for part in slices(x)]
    return torch.where(goes_on, torch.cat(parts), of_candidates)
