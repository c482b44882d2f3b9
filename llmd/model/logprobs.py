"""Log-probabilities of single positions: of the model's own logits, before anything changed them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmd.engine.params import MAX_LOGPROBS
from llmd.engine.step import TokenLogprobs
from llmd.model.draw import largest, slices


class PositionLogprobs(NamedTuple):
    """For P positions: the token's log-probability and rank (1 + how many are likelier), and the `n` likeliest."""

    logprobs: Tensor  # [P] float32
    ranks: Tensor  # [P] int64
    top_ids: Tensor  # [P, n] int64
    top_logprobs: Tensor  # [P, n] float32


def position_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> PositionLogprobs:
    """logits [P, V], token_ids [P] int64. Works in slices: no softmax of all positions at once."""
    parts = [_slice_logprobs(logits[part].float(), token_ids[part], num_top) for part in slices(logits)]
    return parts[0] if len(parts) == 1 else PositionLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _slice_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> PositionLogprobs:
    token = logits.gather(1, token_ids.unsqueeze(1))
    norm = torch.logsumexp(logits, 1, keepdim=True)
    ranks = (logits > token).sum(1) + 1
    if num_top:  # always as many, so that which of several equal ones is taken does not depend on other requests
        values, ids = largest(logits, MAX_LOGPROBS)
        values, ids = values[:, :num_top] - norm, ids[:, :num_top]
    else:
        values, ids = logits.new_zeros(logits.shape[0], 0), token_ids.new_zeros(logits.shape[0], 0)
    return PositionLogprobs((token - norm).squeeze(1), ranks, ids, values)


def to_lists(token_ids: list[int], found: PositionLogprobs, num_top: list[int]) -> list[TokenLogprobs]:
    """Plain data; `found` lies on the host. `num_top` says how many each position asked for."""
    columns = (found.logprobs.tolist(), found.ranks.tolist(), found.top_ids.tolist(), found.top_logprobs.tolist())
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(ids[:n]), tuple(values[:n]))
        for token_id, logprob, rank, ids, values, n in zip(token_ids, *columns, num_top, strict=True)
    ]


def pack(found: PositionLogprobs) -> list[Tensor]:
    """As int32 [P], [P], [P · n], [P · n], to be sent to the host in one piece."""
    return [
        bits(found.logprobs), found.ranks.to(torch.int32), found.top_ids.to(torch.int32).flatten(),
        bits(found.top_logprobs).flatten(),
    ]  # fmt: skip


def unpack(packed: Tensor, num: int, num_top: int) -> PositionLogprobs:
    """What `pack` made of `num` positions with `num_top` each."""
    logprobs, ranks, top_ids, top_logprobs = packed.split([num, num, num * num_top, num * num_top])
    top = top_logprobs.view(torch.float32).view(num, num_top)
    return PositionLogprobs(logprobs.view(torch.float32), ranks, top_ids.view(num, num_top), top)


def bits(x: Tensor) -> Tensor:
    """float32 as the int32 of the same bits."""
    return x.contiguous().view(torch.int32)
