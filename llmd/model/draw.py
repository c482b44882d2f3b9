"""Drawing tokens from logits: exact, cheap on a CPU, free of host synchronisation on a GPU.

A draw is one uniform number per row (a hash of the row's seed and its number of tokens) looked up in the cumulative
distribution, in the order of token ids. Probabilities are held as integers, `floor(exp((x - max) / T) * 2**40)`: integer
sums do not depend on their order, so a row's token is the same on its own, in any batch, and by whichever of the ways
below it is found. What top_k, top_p and min_p keep is said by the smallest logit that stays (ties at the cut all stay),
which has two ways to be found: among the largest few candidates, or, where those do not reach, by counting sort on
the bits of the logits. No large vocabulary is ever sorted, and no noise is drawn for
its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WEIGHT_ONE = 2.0**40  # the weight of the likeliest token; 2**20 tokens of it still fit an int64
ELEMENTS_AT_ONCE = {"cpu": 1 << 18, "gpu": 1 << 24}  # of temporaries over whole rows: a core's cache, a share of memory
BLOCK = 128  # tokens summed (or compared) together before the blocks are
_SORT_UP_TO = 8192  # a vocabulary that is sorted faster than 2 x 2**16 bins are counted
_ROWS = 256  # share the bins

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def slices(x: Tensor) -> Iterator[slice]:
    """Cut the rows of x [R, V] into what is worked on together."""
    size = max(1, ELEMENTS_AT_ONCE["cpu" if x.device.type == "cpu" else "gpu"] // x.shape[1])
    return (slice(start, start + size) for start in range(0, x.shape[0], size))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection whose every output bit depends on every input bit."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniforms(seeds: Tensor, counters: Tensor) -> Tensor:
    """One float64 in [0, 1) for each pair of int64 seed and counter."""
    mixed = _mix(_mix(seeds + _GOLDEN) + _mix(counters * _GOLDEN + 1))
    return _shift_right(mixed, 11).to(torch.float64) * 2.0**-53


def _block_maxima(x: Tensor) -> Tensor:
    """[R, V] -> [R, ceil(V / BLOCK)], the last block may be short."""
    full = x.shape[1] // BLOCK
    parts = []
    if full:
        parts.append(x[:, : full * BLOCK].unflatten(1, (full, BLOCK)).amax(2))
    if full * BLOCK < x.shape[1]:
        parts.append(x[:, full * BLOCK :].amax(1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def first_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row and the first index that has it; NaN counts as largest. Six times argmax on a CPU."""
    block = _block_maxima(x).argmax(1, keepdim=True)
    ids = (block * BLOCK + torch.arange(BLOCK, device=x.device)).clamp_max_(x.shape[1] - 1)
    values = x.gather(1, ids)
    at = values.argmax(1, keepdim=True)
    return values.gather(1, at).squeeze(1), ids.gather(1, at).squeeze(1)


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` largest values of each row, descending, and their ids: only the blocks with the largest maxima are read."""
    width = x.shape[1]
    count = min(count, width)
    if count * BLOCK * 2 >= width:
        values, ids = x.topk(count, 1)
        return values, ids
    blocks = _block_maxima(x).topk(count, 1).indices
    ids = (blocks.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(1)
    inside = ids < width
    values = x.gather(1, ids.clamp_max(width - 1)).masked_fill_(~inside, float("-inf"))
    top = values.topk(count, 1)
    return top.values, ids.gather(1, top.indices).clamp_max_(width - 1)


def probabilities(x: Tensor, maxima: Tensor, inverse_temperature: Tensor) -> Tensor:
    """exp((x - max) / T) in float32: probabilities relative to the likeliest token's. x [R, ·], the others [R]."""
    return x.sub(maxima.unsqueeze(1)).mul_(inverse_temperature.unsqueeze(1)).exp_()


def weights(relative: Tensor) -> Tensor:
    """Relative probabilities as int64."""
    return relative.mul(WEIGHT_ONE).to(torch.int64)


def _targets(uniform: Tensor, total: Tensor) -> Tensor:
    """The rank of the drawn unit of weight, 0 … total - 1. [R, 1]"""
    drawn = (uniform * total.to(torch.float64)).to(torch.int64)
    return torch.minimum(drawn, total - 1).clamp_min_(0).unsqueeze(1)


def pick(weight: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index of each row with probability proportional to its weight. weight [R, V] int64, uniform [R]."""
    num_rows, width = weight.shape
    if width % BLOCK:
        weight = torch.nn.functional.pad(weight, (0, BLOCK - width % BLOCK))
    blocks = weight.view(num_rows, -1, BLOCK)
    sums = blocks.sum(2)
    ends = sums.cumsum(1)
    target = _targets(uniform, ends[:, -1])
    at = (ends <= target).sum(1, keepdim=True).clamp_max_(ends.shape[1] - 1)
    inside = target - (ends.gather(1, at) - sums.gather(1, at))
    chosen = blocks.gather(1, at.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1)
    offset = (chosen.cumsum(1) <= inside).sum(1)
    return (at.squeeze(1) * BLOCK + offset).clamp_max_(width - 1)


def pick_among(ids: Tensor, weight: Tensor, uniform: Tensor) -> Tensor:
    """`pick` where only the tokens `ids` [R, C] can have weight: the same token as from whole rows."""
    ids, order = ids.sort(1)
    ends = weight.gather(1, order).cumsum(1)
    target = _targets(uniform, ends[:, -1])
    at = (ends <= target).sum(1, keepdim=True).clamp_max_(ids.shape[1] - 1)
    return ids.gather(1, at).squeeze(1)


def _first_reaching(amounts: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The last bin of 2**16 from which on the sum up to the end reaches `target`, and the sum of the bins behind it."""
    sums = amounts.flip(1).cumsum(1)
    at = (sums < target).sum(1, keepdim=True).clamp_max_(amounts.shape[1] - 1)
    behind = sums.gather(1, at) - amounts.flip(1).gather(1, at)
    return amounts.shape[1] - 1 - at, behind


def value_reaching(x: Tensor, amounts: Tensor, target: Tensor) -> Tensor:
    """The largest value t of each row such that the amounts of its entries >= t sum to `target` or more.

    x [R, V] float32, amounts [R, V] int64, target [R] int64, at most the amounts' sum -> [R].
    """
    find = _by_sorting if x.shape[1] <= _SORT_UP_TO else _by_counting
    parts = [find(x[at : at + _ROWS], amounts[at : at + _ROWS], target[at : at + _ROWS]) for at in range(0, len(x), _ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_sorting(x: Tensor, amounts: Tensor, target: Tensor) -> Tensor:
    values, order = x.sort(1, descending=True)
    ends = amounts.gather(1, order).cumsum(1)
    at = (ends < target.unsqueeze(1)).sum(1, keepdim=True).clamp_max_(x.shape[1] - 1)
    return values.gather(1, at).squeeze(1)


def _by_counting(x: Tensor, amounts: Tensor, target: Tensor) -> Tensor:
    """A counting sort on the upper, then the lower half of the bits of x."""
    bits = x.contiguous().view(torch.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # int32, ordered as the floats are
    high, target = (key >> 16) + (1 << 15), target.unsqueeze(1)
    bins = torch.zeros(x.shape[0], 1 << 16, dtype=torch.int64, device=x.device)
    upper, behind = _first_reaching(bins.scatter_add_(1, high.to(torch.int64), amounts), target)
    inside = amounts * (high == upper)
    bins.zero_().scatter_add_(1, (key & 0xFFFF).to(torch.int64), inside)
    lower, _ = _first_reaching(bins, target - behind)
    ordered = ((upper << 16) + lower - (1 << 31)).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32).squeeze(1)
