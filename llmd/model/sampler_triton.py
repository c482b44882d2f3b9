"""The sampler of GPUs: the torch sampler's tokens by a handful of launches, without a copy of the logits.

What rows ask for lies in a table on the device, one line a row, and goes there in one copy when a row was admitted; between
such steps nothing goes to the device, and no launch hangs on what rows ask but by what none of them does. Logits processors
other than biases and penalties run in torch, in their place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmd.engine.params import SamplingParams
from llmd.engine.step import RowAdmit
from llmd.model.logits import LogitBias, Penalties
from llmd.model.logprobs import PositionLogprobs
from llmd.model.sampler import SampledTokens, SamplerContext, TorchSampler, _Pass
from llmd.model.staging import put, to_device
from llmd_kernels.logprobs import triton as logprobs_kernels
from llmd_kernels.penalties import Bias, new_scratch
from llmd_kernels.penalties import triton as penalties_kernels
from llmd_kernels.sampling import Knobs
from llmd_kernels.sampling import triton as sampling_kernels


class _Table:
    """What rows ask for, a line each: written on the host, read on the device."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._host = np.zeros(7 * num_rows, np.int64)
        self._device = torch.zeros(7 * num_rows, dtype=torch.int64, device=device)
        # In this order each begins where sixteen bytes can be loaded at once.
        values, facts, seeds = np.split(self._host, [4 * num_rows, 6 * num_rows])
        self._values, self._seeds = values.view(np.float64).reshape(num_rows, 4), seeds
        self._facts = facts.view(np.float32).reshape(num_rows, 4)
        there, their_facts, their_seeds = self._device.split([4 * num_rows, 2 * num_rows, num_rows])
        self.knobs = Knobs(their_seeds, there.view(torch.float64).view(num_rows, 4))
        self.facts = their_facts.view(torch.float32).view(num_rows, 4)
        self._facts[:] = 0, 1, 0, 0  # of lines that nobody took: no penalties
        self._is_new = True

    def set(self, row: int, params: SamplingParams, values: tuple[float, ...], seed: int, num_prompt_tokens: int) -> None:
        """Write a row's line; `values` and `seed` are as Knobs has them."""
        self._values[row], self._seeds[row] = values, seed
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        self._facts[row] = num_prompt_tokens, *penalties
        self._is_new = True

    def upload(self) -> None:
        """Bring the device's copy up to date; it stays where it is."""
        if self._is_new:
            put(self._device, self._host)
            self._is_new = False


@dataclass(frozen=True, slots=True)
class _Wishes(_Pass):
    """What the present composition of the batch needs, beside the table."""

    any_drawn: bool
    any_top_k: bool
    any_top_p: bool
    bias: Bias | None
    has_penalties: bool


class TritonSampler(TorchSampler):
    """The Sampler in Triton kernels; a row's tokens are TorchSampler's on the same device."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        self._max_num_rows = context.max_num_rows
        self._table = _Table(context.max_num_rows, context.device)
        self._scratch: Tensor | None = None

    def admit(self, admit: RowAdmit) -> None:
        super().admit(admit)
        if isinstance(admit.params, SamplingParams):
            values, seed = self._values(admit.params), self._seeds[admit.row]
            self._table.set(admit.row, admit.params, values, seed, admit.num_prompt_tokens)

    def launches(self, host_rows: tuple[int, ...]) -> Hashable | None:
        """As the protocol says: nothing goes to the device in `sample` but where rows have biases or processors, or ask for
        logprobs."""
        now = self._prepared(host_rows)
        assert isinstance(now, _Wishes)
        if now.processors or now.bias is not None or now.logprobs_index is not None:
            return None
        self._table.upload()
        if now.has_penalties:
            self._counts()
        return now.any_drawn, now.any_drawn and now.any_top_k, now.any_drawn and now.any_top_p, now.has_penalties

    def sample(
        self,
        logits: Tensor,
        rows: Tensor,
        num_tokens: Tensor,
        token_ids: Tensor,
        *,
        host_rows: Sequence[int] | None = None,
        max_tokens: int | None = None,
    ) -> SampledTokens:
        now = self._prepared(tuple(rows.tolist() if host_rows is None else host_rows))
        assert isinstance(now, _Wishes)
        self._table.upload()
        raw, raw_at, failed = logits, now.logprobs_index, dict[int, str]()
        if now.processors or now.bias is not None or now.has_penalties:
            if now.logprobs_index is not None:  # logprobs are the model's own: of logits that nothing changed
                raw, raw_at = logits.index_select(0, now.logprobs_index), None
            logits = self._changed(logits.float(), now, rows, num_tokens, token_ids, max_tokens, failed)
        tokens, best = sampling_kernels.sample(
            logits, rows, num_tokens, self._table.knobs,
            any_drawn=now.any_drawn, any_top_k=now.any_top_k, any_top_p=now.any_top_p,
        )  # fmt: skip
        found = None
        if now.logprobs_index is not None:
            chosen = tokens[now.logprobs_index]
            found = PositionLogprobs(*logprobs_kernels.token_logprobs(raw, chosen, max(now.num_top), raw_at))
        return SampledTokens(tokens, best, now.host_rows, found, now.logprobs_at, now.num_top, failed)

    def _changed(
        self,
        logits: Tensor,
        now: _Wishes,
        rows: Tensor,
        num_tokens: Tensor,
        token_ids: Tensor,
        max_tokens: int | None,
        failed: dict[int, str],
    ) -> Tensor:
        """Biases, other processors, penalties, in this order; the first and the last at once where nothing is between."""
        facts, scratch = (self._table.facts, self._counts()) if now.has_penalties else (None, None)
        if not now.processors:
            return penalties_kernels.penalise(logits, rows, num_tokens, token_ids, facts, scratch, now.bias)
        logits = penalties_kernels.penalise(logits, rows, num_tokens, token_ids, None, None, now.bias)
        max_tokens = int(num_tokens.max()) if max_tokens is None else max_tokens
        logits = self._processed(logits, now, num_tokens, token_ids, max_tokens, failed)
        return penalties_kernels.penalise(logits, rows, num_tokens, token_ids, facts, scratch)

    def _counts(self) -> Tensor:
        """The scratch of penalties, from the first time that any row wants it."""
        if self._scratch is None:
            self._scratch = new_scratch(self._max_num_rows, self._vocab_size, self._device)
        return self._scratch

    def _prepare(self, host_rows: tuple[int, ...]) -> _Wishes:
        params = [self._params[row] for row in host_rows]
        asking = [(at, p.logprobs) for at, p in enumerate(params) if p.logprobs is not None]
        drawn = [p for p in params if not p.is_greedy]
        active = self._active_processors(host_rows)
        known = {type(processor) for processor, *_ in active}
        return _Wishes(
            host_rows=host_rows,
            greedy=None,
            plain=None,
            cut=None,
            processors=[entry for entry in active if not isinstance(entry[0], LogitBias | Penalties)],
            logprobs_at=tuple(at for at, _ in asking),
            logprobs_index=to_device([at for at, _ in asking], np.int64, self._device) if asking else None,
            num_top=tuple(num for _, num in asking),
            any_drawn=bool(drawn),
            any_top_k=any(0 < p.top_k < self._vocab_size for p in drawn),
            any_top_p=any(p.top_p < 1 for p in drawn),
            bias=self._bias(params) if LogitBias in known else None,
            has_penalties=Penalties in known,
        )

    def _bias(self, params: Sequence[SamplingParams]) -> Bias:
        """All rows' biases; ids outside the vocabulary were refused at the wire, here they must only do no harm."""
        entries = [{k: v for k, v in (p.logit_bias or {}).items() if 0 <= k < self._vocab_size} for p in params]
        starts = np.cumsum([0, *map(len, entries)])
        columns: list[Any] = [[key for row in entries for key in row], [value for row in entries for value in row.values()]]
        return Bias(
            to_device(starts, np.int32, self._device),
            to_device(columns[0], np.int64, self._device),
            to_device(columns[1], np.float32, self._device),
        )
