"""The last token of a bad word is impossible while the output ends with the tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from llmd.api.v1 import LogitsContext, RowAdmit, Rows, SamplingParams, to_device

_ANY = -1  # stands left of words shorter than the longest


class _Words(NamedTuple):
    """All bad words of the rows of a step (N words, the longest has K + 1 tokens)."""

    owner: torch.Tensor  # [N] int64: index into the step's rows
    prefix: torch.Tensor  # [N, K] int64, right-aligned
    last: torch.Tensor  # [N] int64
    earliest: torch.Tensor  # [N] int64: the fewest tokens that its row must have, so that only output is looked at


class BadWords:
    """A LogitsProcessor over `bad_words_ids`, which the text layer made of `bad_words`."""

    keeps_argmax = False

    def __init__(self, context: LogitsContext) -> None:
        self._vocab_size, self._device = context.vocab_size, context.device
        self._words: dict[int, tuple[int, list[Sequence[int]]]] = {}
        self._cached: tuple[tuple[int, ...], _Words] | None = None

    def wants(self, params: SamplingParams) -> bool:
        return bool(params.bad_words)

    def admit(self, admit: RowAdmit) -> None:
        known = [word for word in admit.bad_words_ids if word and all(0 <= t < self._vocab_size for t in word)]
        self._words[admit.row] = (admit.num_prompt_tokens, list(known))
        self._cached = None

    def release(self, row: int) -> None:
        self._words.pop(row, None)
        self._cached = None

    def apply(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        if self._cached is None or self._cached[0] != rows.host_ids:
            self._cached = (rows.host_ids, self._joined(rows.host_ids))
        words = self._cached[1]
        num_tokens, length = rows.num_tokens[words.owner], words.prefix.shape[1]
        back = torch.arange(-length, 0, device=num_tokens.device)
        at = (num_tokens.unsqueeze(1) + back).clamp_min_(0)  # [N, K]
        recent = rows.token_ids[rows.ids[words.owner].unsqueeze(1), at]
        hits = ((recent == words.prefix) | (words.prefix == _ANY)).all(1) & (num_tokens >= words.earliest)
        barred = torch.where(hits, float("-inf"), 0.0)
        return logits.index_put_((rows.at[words.owner], words.last), barred, accumulate=True)

    def _joined(self, host_ids: tuple[int, ...]) -> _Words:
        words = [(i, self._words[row][0], word) for i, row in enumerate(host_ids) for word in self._words[row][1]]
        length = max((len(word) for _, _, word in words), default=1) - 1
        prefix = [[_ANY] * (length + 1 - len(word)) + list(word[:-1]) for _, _, word in words]
        return _Words(
            self._tensor([owner for owner, _, _ in words]),
            self._tensor(prefix).reshape(len(words), length),
            self._tensor([word[-1] for _, _, word in words]),
            self._tensor([num_prompt + len(word) - 1 for _, num_prompt, word in words]),
        )

    def _tensor(self, values: Sequence[int] | Sequence[list[int]]) -> torch.Tensor:
        return to_device(values, np.int64, self._device)
