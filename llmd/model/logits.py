"""Logits processors: what changes a row's logits between the model and the draw, for the rows that want it only.

A processor keeps its rows' facts itself (`admit`, `release`) and is called once a step with the whole batch's logits and
the places of its rows in it. It must not synchronise with the host: no `.item()`, no boolean indexing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmd.engine.params import SamplingParams
from llmd.engine.step import RowAdmit
from llmd.model.staging import to_device

_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsContext:
    """What a processor is built for."""

    max_num_rows: int
    max_model_len: int
    vocab_size: int
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one step that want a processor (P of the batch's R)."""

    at: Tensor  # [P] int64: their places in the batch
    ids: Tensor  # [P] int64: their rows in the executor's persistent arrays
    host_ids: tuple[int, ...]  # the same, on the host
    num_tokens: Tensor  # [P] int64: tokens each has, prompt included
    max_tokens: int  # no row of the batch has more
    token_ids: Tensor  # [max_num_rows, max_model_len] int32, indexed by row: those tokens


class LogitsProcessor(Protocol):
    """A step between logits and sampling."""

    keeps_argmax: bool  # True: never changes which token is largest, so greedy rows do without

    def wants(self, params: SamplingParams) -> bool:
        """Whether a row with these params needs this processor."""

    def admit(self, admit: RowAdmit) -> None:
        """A row that wants it arrives; one that is admitted again replaces what was known of it."""

    def release(self, row: int) -> None:
        """The row is free again. Called for admitted rows only."""

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        """Change `logits` [R, V] float32 at `rows.at`, in place, and return it."""


class TokenLists:
    """For each row a list of token ids, each with a number: joined for the rows of a step, once per composition."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._lists: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cached: tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] | None = None

    def set(self, row: int, token_ids: Iterable[int], values: Iterable[float] = ()) -> None:
        """Ids outside the vocabulary are left out: they were refused at the wire, here they must only do no harm."""
        ids = np.fromiter(token_ids, dtype=np.int64)
        numbers = np.fromiter(values, dtype=np.float32)
        numbers = numbers if numbers.size else np.zeros(ids.size, np.float32)
        inside = (ids >= 0) & (ids < self._vocab_size)
        ids, first = np.unique(ids[inside], return_index=True)
        self._lists[row] = (ids, numbers[inside][first])
        self._cached = None

    def drop(self, row: int) -> None:
        """Forget the row."""
        self._lists.pop(row, None)
        self._cached = None

    def joined(self, host_ids: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Over all entries of these rows: the index into `host_ids`, the token id, the number. [N] each."""
        if self._cached is None or self._cached[0] != host_ids:
            lists = [self._lists[row] for row in host_ids]
            owner = np.repeat(np.arange(len(lists)), [ids.size for ids, _ in lists])
            tensors = (
                to_device(owner, np.int64, self._device),
                to_device(np.concatenate([ids for ids, _ in lists]), np.int64, self._device),
                to_device(np.concatenate([numbers for _, numbers in lists]), np.float32, self._device),
            )
            self._cached = (host_ids, tensors)
        return self._cached[1]


class LogitBias:
    """`logit_bias`: numbers added to the logits of single tokens."""

    keeps_argmax = False

    def __init__(self, context: LogitsContext) -> None:
        self._lists = TokenLists(context.vocab_size, context.device)

    def wants(self, params: SamplingParams) -> bool:
        return bool(params.logit_bias)

    def admit(self, admit: RowAdmit) -> None:
        assert isinstance(admit.params, SamplingParams)
        bias = admit.params.logit_bias or {}
        self._lists.set(admit.row, bias.keys(), bias.values())

    def release(self, row: int) -> None:
        self._lists.drop(row)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        owner, ids, bias = self._lists.joined(rows.host_ids)
        return logits.index_put_((rows.at[owner], ids), bias, accumulate=True)


class AllowedTokens:
    """`allowed_token_ids`: every other token becomes impossible."""

    keeps_argmax = False

    def __init__(self, context: LogitsContext) -> None:
        self._lists = TokenLists(context.vocab_size, context.device)

    def wants(self, params: SamplingParams) -> bool:
        return params.allowed_token_ids is not None

    def admit(self, admit: RowAdmit) -> None:
        assert isinstance(admit.params, SamplingParams)
        self._lists.set(admit.row, admit.params.allowed_token_ids or ())

    def release(self, row: int) -> None:
        self._lists.drop(row)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        owner, ids, _ = self._lists.joined(rows.host_ids)
        places = (rows.at[owner], ids)
        kept = logits[places]
        logits.index_fill_(0, rows.at, float("-inf"))
        return logits.index_put_(places, kept)


class MinTokens:
    """`min_tokens`: EOS and stop tokens are impossible until so many tokens were generated."""

    keeps_argmax = False

    def __init__(self, context: LogitsContext) -> None:
        self._lists = TokenLists(context.vocab_size, context.device)

    def wants(self, params: SamplingParams) -> bool:
        return params.min_tokens > 0

    def admit(self, admit: RowAdmit) -> None:
        assert isinstance(admit.params, SamplingParams)
        ends = (*admit.eos_token_ids, *admit.params.stop_token_ids)
        until = admit.num_prompt_tokens + admit.params.min_tokens  # float32 is exact up to 16 M tokens
        self._lists.set(admit.row, ends, [float(until)] * len(ends))

    def release(self, row: int) -> None:
        self._lists.drop(row)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        owner, ids, until = self._lists.joined(rows.host_ids)
        barred = torch.where(rows.num_tokens[owner] < until, float("-inf"), 0.0)
        return logits.index_put_((rows.at[owner], ids), barred, accumulate=True)


class Penalties:
    """Repetition (prompt and output tokens), frequency and presence penalties (output tokens), in this order.

    Only tokens that a row has are touched, and counts are taken from its tokens anew each step in a scratch that is
    clean again afterwards: nothing is kept between steps that preemption or a dropped token could make wrong.
    """

    keeps_argmax = False

    def __init__(self, context: LogitsContext) -> None:
        self._vocab_size, self._device = context.vocab_size, context.device
        self._facts = np.zeros((context.max_num_rows, 4), np.float32)  # prompt tokens, repetition, frequency, presence
        self._scratch: Tensor | None = None
        self._cached: tuple[tuple[int, ...], Tensor] | None = None

    def wants(self, params: SamplingParams) -> bool:
        return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0

    def admit(self, admit: RowAdmit) -> None:
        params = admit.params
        assert isinstance(params, SamplingParams)
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._facts[admit.row] = (admit.num_prompt_tokens, *penalties)
        self._cached = None

    def release(self, row: int) -> None:
        self._cached = None

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        if self._cached is None or self._cached[0] != rows.host_ids:
            self._cached = (rows.host_ids, to_device(self._facts[list(rows.host_ids)], np.float32, self._device))
        facts, size = self._cached[1], self._num_at_once(len(rows.host_ids), logits.shape[1])
        for start in range(0, len(rows.host_ids), size):
            part = slice(start, start + size)
            self._apply(logits, rows.at[part], rows.ids[part], rows.num_tokens[part], facts[part], rows)
        return logits

    def _num_at_once(self, num_rows: int, width: int) -> int:
        """How many rows share the scratch, which grows to what was wanted so far and no further than its bound."""
        size = min(num_rows, max(1, _SCRATCH_BYTES // (8 * width)))
        if self._scratch is None or self._scratch.shape[0] < size or self._scratch.shape[1] != width:
            self._scratch = torch.zeros(size, width, dtype=torch.int64, device=self._device)
        return size

    def _apply(self, logits: Tensor, at: Tensor, ids: Tensor, num_tokens: Tensor, facts: Tensor, rows: Rows) -> None:
        assert self._scratch is not None
        tokens = rows.token_ids[:, : rows.max_tokens].index_select(0, ids).to(torch.int64)  # [P, L]
        position = torch.arange(tokens.shape[1], device=tokens.device)
        is_output = position >= facts[:, :1]
        is_token = (position < num_tokens.unsqueeze(1)) & (tokens >= 0) & (tokens < logits.shape[1])
        tokens = torch.where(is_token, tokens, 0)  # the others stand for token 0, and count nothing
        amount = torch.where(is_token, torch.where(is_output, 1 << 32, 1), 0)
        scratch = self._scratch[: tokens.shape[0]].scatter_add_(1, tokens, amount)
        seen = scratch.gather(1, tokens)  # output count in the upper half
        scratch.scatter_(1, tokens, 0)
        _, repetition, frequency, presence = facts.unsqueeze(2).unbind(1)
        values = logits[at.unsqueeze(1), tokens]
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        count = (seen >> 32).to(torch.float32)
        values = torch.where(seen > 0, repeated, values) - frequency * count - presence * (count > 0)
        logits.index_put_((at.unsqueeze(1).expand_as(tokens), tokens), values)  # equal tokens get equal values


def core_processors(context: LogitsContext, others: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """All processors in the order in which they run: biases and masks, the plugins', then penalties."""
    first: list[Callable[[LogitsContext], LogitsProcessor]] = [LogitBias, AllowedTokens, MinTokens]
    return [*(make(context) for make in first), *others, Penalties(context)]
