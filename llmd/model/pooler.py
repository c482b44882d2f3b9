"""From hidden states of prompts to vectors: pooled row by row as chunks come, finished for all rows of a step at once.

feed(row, hidden) ─► one state a row (last, cls, mean, max …) ─► take(): dense, head, cut, normalize, one copy to the host
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmd.engine.params import PoolingParams
from llmd.model.sentence import Tail
from llmd.model.staging import Outbox


class Head(NamedTuple):
    """What a classifier makes of pooled vectors."""

    classify: Callable[[Tensor], Tensor]  # [N, hidden_size] → [N, num_labels], before the activation
    activation: str  # "sigmoid" | "softmax" | "none"


class _Part(NamedTuple):
    """What the chunks of a prompt amount to so far."""

    state: Tensor  # [hidden_size] float32, or [count, hidden_size] for "all"
    num_tokens: int


class _Finished(NamedTuple):
    row: int
    vector: Tensor
    params: PoolingParams


_Combine = Callable[[Tensor, Tensor], Tensor]


def _first(old: Tensor, new: Tensor) -> Tensor:
    return old


def _weighted_sum(hidden: Tensor, start: int) -> Tensor:
    """Each token counts as much as its place, from 1 on."""
    return torch.arange(start + 1, start + 1 + hidden.shape[0], dtype=hidden.dtype, device=hidden.device) @ hidden


# pooling → what a chunk [count, hidden_size] from a position on gives, and how that joins what came before
_GATHERED: dict[str, tuple[Callable[[Tensor, int], Tensor], _Combine]] = {
    "mean": (lambda hidden, start: hidden.sum(0), torch.add),
    "mean_sqrt_len": (lambda hidden, start: hidden.sum(0), torch.add),
    "weightedmean": (_weighted_sum, torch.add),
    "max": (lambda hidden, start: hidden.amax(0), torch.maximum),
    "cls": (lambda hidden, start: hidden[0], _first),
    "all": (lambda hidden, start: hidden, lambda old, new: torch.cat((old, new))),
}


class Pooler:
    """Owned by the runner. `default` is how this architecture pools where neither request nor files (`tail`) say it."""

    def __init__(
        self,
        default: str = "last",
        head: Head | None = None,
        tail: Tail | None = None,
        announce: Callable[[list[int]], None] = lambda rows: None,
    ) -> None:
        """`announce` is told whose vectors the head sees next, a row each: they may have adapters."""
        self._tail = tail or Tail()
        self._default = self._tail.pooling or default
        self._head = head
        self._announce = announce
        self._parts: dict[int, _Part] = {}
        self._finished: list[_Finished] = []

    def admit(self, row: int) -> None:
        """A sequence begins (again) in this row."""
        self._parts.pop(row, None)

    def release(self, row: int) -> None:
        """The row is free."""
        self._parts.pop(row, None)

    def feed(self, row: int, hidden: Tensor, start: int, is_last: bool, params: PoolingParams) -> str | None:
        """A chunk's hidden states [count, hidden_size] from position `start` on; what is wrong, or None."""
        if error := self._why_not(hidden.shape[1], params):
            return error if is_last else None
        pooling = params.pooling or self._default
        if pooling == "last":
            if is_last:
                self._finished.append(_Finished(row, hidden[-1].float(), params))
            return None
        gather, combine = _GATHERED[pooling]
        part = _Part(gather(hidden.float(), start), hidden.shape[0])
        if start:
            before = self._parts.pop(row, None)
            if before is None or before.num_tokens != start:
                return f"pooling {pooling!r} needs every hidden state of the prompt, but its beginning was not computed"
            part = _Part(combine(before.state, part.state), start + part.num_tokens)
        if is_last:
            self._finished.append(_Finished(row, _scaled(part, pooling), params))
        else:
            self._parts[row] = part
        return None

    def _why_not(self, hidden_size: int, params: PoolingParams) -> str | None:
        size = self._tail.size(hidden_size)
        if params.dimensions is not None and params.dimensions > size:
            return f"dimensions must be at most {size}, got {params.dimensions}"
        if params.task == "classify" and self._head is None:
            return "this model has no classification head"
        if params.task == "classify" and params.pooling == "all":
            return "pooling 'all' keeps every token's vector, and a classifier wants one"
        return None

    def take(self, outbox: Outbox) -> Callable[[], dict[int, Tensor]]:
        """This step's vectors by row, on the host once they are asked for: equal requests are finished together."""
        groups: dict[tuple[object, ...], list[_Finished]] = {}
        for item in self._finished:
            params = item.params
            key = (params.task, params.dimensions, params.normalize, params.use_activation, item.vector.shape)
            groups.setdefault(key, []).append(item)
        self._finished = []
        sent = []
        for group in groups.values():
            rows = [item.row for item in group]
            self._announce(rows)
            sent.append((rows, outbox.send(self._finish(torch.stack([item.vector for item in group]), group[0].params))))
        return lambda: {row: vector for rows, landed in sent for row, vector in zip(rows, landed.wait(), strict=True)}

    def forget(self) -> None:
        """The step came to nothing."""
        self._finished = []

    def _finish(self, vectors: Tensor, params: PoolingParams) -> Tensor:
        """[N, hidden_size] → what the requests want of each."""
        if params.task == "classify" and self._head is not None:
            scores = self._head.classify(vectors).float()
            return scores if params.use_activation is False else _activated(scores, self._head.activation)
        for dense in self._tail.dense:
            vectors = dense(vectors)
        vectors = vectors[..., : params.dimensions]
        return vectors if params.normalize is False else F.normalize(vectors, dim=-1)


def _scaled(part: _Part, pooling: str) -> Tensor:
    count = part.num_tokens
    divisor = {"mean": count, "mean_sqrt_len": math.sqrt(count), "weightedmean": count * (count + 1) / 2}.get(pooling)
    return part.state if divisor is None else part.state / divisor


def _activated(scores: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        return scores.softmax(-1)
    return scores.sigmoid() if activation == "sigmoid" else scores
