"""Recurrences over a batch's rows, each from its own state on: whole prompts, chunks and single tokens by the same code.

A step's T tokens lie in one line, row after row. A scan by doubling needs log2(longest row) passes over all of them: in
pass `s` a token takes what the one `s` before it has summed up, unless that is another row's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmd.model.batch import Batch
    from llmd.model.states import RowState


def linear_recurrence(decay: Tensor, values: Tensor, state: RowState, batch: Batch) -> Tensor:
    """h_t = decay_t · h_(t-1) + values_t, element by element, along each row; [T, …] float32.

    `decay` broadcasts to `values` [T, *shape]; `state`, of that shape, is h before the row's first token and is left at its
    last. Sums are in float32, and in an order that depends on how a prompt is cut into chunks.
    """
    decay, values = torch.broadcast_tensors(decay.float(), values.float())
    first, last, offsets = _places(batch)
    sums = values.index_add(0, first, decay[first] * state.read(batch).float())
    step = 1
    while step < batch.max_query_len:
        is_own = (offsets[step:] >= step).view(-1, *[1] * (values.dim() - 1))
        later = torch.where(is_own, sums[step:] + decay[step:] * sums[:-step], sums[step:])
        factors = torch.where(is_own, decay[step:] * decay[:-step], decay[step:])
        sums, decay = torch.cat((sums[:step], later)), torch.cat((decay[:step], factors))
        step *= 2
    state.write(batch, sums[last])
    return sums


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, state: RowState, batch: Batch) -> Tensor:
    """y_t = bias + Σ_k weight[:, k] · x_(t-K+1+k), a causal convolution of each channel; [T, D].

    x [T, D], weight [D, K] with K at least 2, bias [D]. `state` [K-1, D] holds the K-1 inputs before the row's first token,
    which are zeros where its sequence begins.
    """
    width = weight.shape[1]
    first, last, offsets = _places(batch)
    before = state.read(batch).to(x.dtype)  # [R, K-1, D]
    token_rows = torch.repeat_interleave(last - first + 1, output_size=batch.num_tokens)
    places = torch.arange(batch.num_tokens, device=x.device)
    y = x * weight[:, -1]
    for back in range(1, width):
        earlier = x[(places - back).clamp_min(0)]
        kept = before[token_rows, (width - 1 + offsets - back).clamp_max(width - 2)]
        y = y + torch.where((offsets >= back).unsqueeze(1), earlier, kept) * weight[:, width - 1 - back]
    state.write(batch, _last_inputs(x, before, first, last))
    return y if bias is None else y + bias


def _last_inputs(x: Tensor, before: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The last K-1 inputs of each row [R, K-1, D], older ones from the state."""
    num_kept = before.shape[1]
    back = torch.arange(num_kept - 1, -1, -1, device=x.device)
    places = last.unsqueeze(1) - back  # [R, K-1], into x
    in_state = places - first.unsqueeze(1) + num_kept
    kept = before.gather(1, in_state.clamp(0, num_kept - 1).unsqueeze(2).expand_as(before))
    return torch.where((places >= first.unsqueeze(1)).unsqueeze(2), x[places.clamp_min(0)], kept)


def _places(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's first and last token lie among the T, and how far each token is from its row's first."""
    bounds = batch.query_start.long()
    first, last = bounds[:-1], bounds[1:] - 1
    offsets = batch.positions - torch.repeat_interleave(
        batch.positions[first], last - first + 1, output_size=batch.num_tokens
    )
    return first, last, offsets
