"""What a step gives besides tokens: prompt log-probabilities, and errors of single rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmd.engine.step import TokenLogprobs
from llmd.model.logprobs import pack, position_logprobs, to_lists, unpack
from llmd.model.staging import Landed, Outbox, send, to_device
from llmd_kernels import bitmask as bitmask_kernels

if TYPE_CHECKING:
    import numpy.typing as npt

    from llmd.engine.grammar import Bitmask

_LOGITS_BYTES_AT_ONCE = 64 << 20


class _Scored(NamedTuple):
    """Some positions of a row's prompt, on their way to the host."""

    row: int
    landed: Landed  # next_ids [P], and the rest as `pack` lays it out
    num: int
    num_top: int  # as many as there are in the vocabulary at most

    def entries(self) -> list[TokenLogprobs]:
        """Plain data, once it has arrived."""
        next_ids, rest = self.landed.wait().split([self.num, self.num * (2 + 2 * self.num_top)])
        return to_lists(next_ids.tolist(), unpack(rest, self.num, self.num_top), [self.num_top] * self.num)


class PromptScorer:
    """Prompt log-probabilities of a step, computed a few positions at a time: a whole prompt's logits would be gigabytes."""

    def __init__(self, logits: Callable[[Tensor], Tensor], outbox: Outbox) -> None:
        self._logits, self._outbox = logits, outbox
        self._found: list[_Scored] = []
        self._at_once = 0

    def score(self, row: int, hidden: Tensor, next_ids: Tensor, num_top: int) -> None:
        """hidden [P, hidden_size] at the positions before next_ids [P]. Waits for nothing."""
        start = 0
        while start < hidden.shape[0]:
            part = slice(start, start + (self._at_once or 1))
            logits = self._logits(hidden[part])
            self._at_once = self._at_once or max(1, _LOGITS_BYTES_AT_ONCE // (4 * logits.shape[1]))
            found = position_logprobs(logits, next_ids[part], num_top)
            packed = torch.cat([next_ids[part].to(torch.int32), *pack(found)])
            self._found.append(_Scored(row, self._outbox.send(packed), *found.top_ids.shape))
            start += logits.shape[0]

    def take(self) -> Callable[[], dict[int, list[TokenLogprobs]]]:
        """This step's entries by row, once they are asked for."""
        found, self._found = self._found, []

        def entries() -> dict[int, list[TokenLogprobs]]:
            by_row: dict[int, list[TokenLogprobs]] = {}
            for part in found:
                by_row.setdefault(part.row, []).extend(part.entries())
            return by_row

        return entries


_FEW = 16  # a mask row with less than one in so many words set is worked on word by word


def mask_logits(logits: Tensor, places: Sequence[int], bitmask: Bitmask) -> Tensor:
    """Bar every token whose bit is not set: row i of `bitmask` for row places[i] of logits [R, V] float32, in place."""
    rows = np.ascontiguousarray(np.asarray(bitmask)).view(np.uint32)
    if logits.device.type == "cpu":
        for place, words in zip(places, rows, strict=True):
            _mask_row(logits[place], words)
        return logits
    index = to_device(places, np.int64, logits.device)
    return bitmask_kernels.mask_logits(logits, index, send(rows.view(np.int32), logits.device))


def _bits(words: npt.NDArray[np.uint32], count: int) -> npt.NDArray[np.bool_]:
    """The first `count` bits of each row of words."""
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little", count=count).view(np.bool_)


def _mask_row(row: Tensor, words: npt.NDArray[np.uint32]) -> None:
    """One row [V] on the CPU. Most masks allow next to nothing: of 150,000 tokens only those few are looked at."""
    some = np.flatnonzero(words)
    if len(some) * _FEW >= len(words):
        row.masked_fill_(torch.from_numpy(_bits(~words, len(row))), float("-inf"))
        return
    nth, bit = np.nonzero(_bits(words[some, None], 32))
    token_ids = some[nth] * 32 + bit
    token_ids = token_ids[token_ids < len(row)]
    values = row.numpy()  # torch would wake its threads for each of the three
    kept = values[token_ids]
    values.fill(-np.inf)
    values[token_ids] = kept


class RowErrors:
    """Why single rows cannot be served; told with every step that computes them until they are released."""

    def __init__(self) -> None:
        self._errors: dict[int, str] = {}

    def add(self, row: int, error: str) -> None:
        """The first reason counts."""
        self._errors.setdefault(row, error)

    def release(self, row: int) -> None:
        """The row is free, or taken by another sequence."""
        self._errors.pop(row, None)

    def of(self, rows: Iterable[int]) -> dict[int, str]:
        """Errors of these rows."""
        if not self._errors:
            return {}
        return {row: self._errors[row] for row in rows if row in self._errors}
