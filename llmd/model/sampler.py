"""From logits to tokens for all rows of a step at once.

    logits ─► raw logprobs (rows that asked) ─► processors (rows that want each) ─► greedy │ plain │ cut ─► one copy to host

Which rows want what is known on the host from `admit`, so a pass in which nobody wants a feature pays nothing for it. What a
composition of rows needs (`_Pass`) is built once and kept while the same rows go on decoding. Draws are exact and depend on
the row's logits, its seed and its number of tokens only (draw.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from llmd.engine.params import SamplingParams
from llmd.engine.step import NONFINITE_LOGITS, RowAdmit, TokenLogprobs
from llmd.model.cuts import Cuts, draw_cut
from llmd.model.draw import first_max, pick, probabilities, slices, uniforms, weights
from llmd.model.logits import LogitsContext, LogitsProcessor, Rows, core_processors
from llmd.model.logprobs import PositionLogprobs, bits, pack, position_logprobs, to_lists, unpack
from llmd.model.staging import Landed, Outbox, to_device
from llmd_kernels import native
from llmd_kernels.sampling import Knobs
from llmd_kernels.sampling import sample as draw_rows

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 64  # bounds float32 copies of 16-bit logits


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerContext:
    """What a sampler is built for."""

    max_num_rows: int
    max_model_len: int
    vocab_size: int
    device: torch.device
    logits_processors: Sequence[LogitsProcessor] = ()


class HostTokens(NamedTuple):
    """A step's tokens as plain data."""

    token_ids: list[int]  # in the order of the batch
    logprobs: dict[int, list[TokenLogprobs]]  # by row, one entry each: rows that asked
    errors: dict[int, str]  # by row: no token could be drawn, what stands in token_ids means nothing


class SampledTokens(NamedTuple):
    """What a step sampled, still on the device (R rows, of which P asked for logprobs)."""

    token_ids: Tensor  # [R] int64
    best: Tensor  # [R] float32: the largest logit when the token was drawn
    host_rows: tuple[int, ...]
    logprobs: PositionLogprobs | None
    logprobs_at: tuple[int, ...]  # the P places in the batch
    num_top: tuple[int, ...]  # how many each asked for
    failed: Mapping[int, str] = MappingProxyType({})  # by row: a logits processor raised

    @property
    def is_bad(self) -> Tensor:
        """[R] bool: nothing could be drawn, the row had NaN, an infinite logit, or no token left."""
        return ~torch.isfinite(self.best)

    def to_host(self, outbox: Outbox | None = None) -> PendingTokens:
        """Start one copy of everything; it waits for nothing until its `result` is asked for."""
        columns = [self.token_ids.to(torch.int32), bits(self.best)]
        if self.logprobs is not None:
            columns += pack(self.logprobs)
        packed = torch.cat(columns)
        return PendingTokens(self, (outbox or Outbox(packed.device)).send(packed), len(self.host_rows))


class PendingTokens(NamedTuple):
    """SampledTokens on their way to the host."""

    sampled: SampledTokens
    landed: Landed
    num_places: int  # in the batch, of which the first are rows

    def result(self) -> HostTokens:
        """Wait for the copy and unpack it."""
        packed, sampled, places = self.landed.wait(), self.sampled, self.num_places
        num_rows = len(sampled.host_rows)
        token_ids, rest = packed[:num_rows].tolist(), packed[2 * places :]
        best = packed[places : places + num_rows].view(torch.float32)
        errors = {}
        if not torch.isfinite(best).all():
            values = zip(sampled.host_rows, best.tolist(), strict=True)
            errors = {row: _why_bad(value) for row, value in values if not math.isfinite(value)}
        errors.update(sampled.failed)
        return HostTokens(token_ids, self._logprobs(token_ids, rest, errors), errors)

    def _logprobs(self, token_ids: list[int], rest: Tensor, errors: dict[int, str]) -> dict[int, list[TokenLogprobs]]:
        sampled, num = self.sampled, len(self.sampled.logprobs_at)
        if sampled.logprobs is None:
            return {}
        found = unpack(rest, num, sampled.logprobs.top_ids.shape[1])
        lists = to_lists([token_ids[at] for at in sampled.logprobs_at], found, list(sampled.num_top))
        rows = [sampled.host_rows[at] for at in sampled.logprobs_at]
        return {row: [entry] for row, entry in zip(rows, lists, strict=True) if row not in errors}


def _why_bad(best: float) -> str:
    if best == -math.inf:
        return "no token is left to sample: allowed_token_ids, bad_words, logit_bias and min_tokens exclude all of them"
    return NONFINITE_LOGITS


class Sampler(Protocol):
    """Turns logits into tokens. Called on the executor thread."""

    def admit(self, admit: RowAdmit) -> None:
        """A row arrives, or comes back; rows that pool are ignored."""

    def release(self, row: int) -> None:
        """The row is free again."""

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
        """Draw one token for each row. float32 logits may be overwritten.

        logits [R, V]; rows [R] int64; num_tokens [R] int64: tokens each row has before this one; token_ids [max_num_rows,
        max_model_len] int32: those tokens, by row. `host_rows` is `rows` on the host and `max_tokens` a bound on
        num_tokens: where they are not given they are read from the device.

        A sampler whose calls may be recorded in a graph has `launches(host_rows: tuple[int, ...]) -> Hashable | None` too:
        it brings up to date what `sample` reads on the device, and tells what decides, beside the number of rows, which
        work `sample` queues; None where that cannot be recorded. Equal answers stand for equal work.
        """


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are drawn in the same way. `at` is None where they are all of the batch."""

    host_at: list[int]
    at: Tensor | None
    cuts: Cuts
    seeds: Tensor


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the present composition of the batch needs."""

    host_rows: tuple[int, ...]
    greedy: _Group | None
    plain: _Group | None
    cut: _Group | None
    processors: list[tuple[LogitsProcessor, Tensor, Tensor, tuple[int, ...]]]  # with its places, rows, rows on the host
    logprobs_at: tuple[int, ...]
    logprobs_index: Tensor | None
    num_top: tuple[int, ...]


class TorchSampler:
    """The Sampler for any device: in plain torch, on a CPU by a kernel where there is one."""

    def __init__(self, context: SamplerContext) -> None:
        self._device, self._vocab_size = context.device, context.vocab_size
        facts = LogitsContext(
            max_num_rows=context.max_num_rows,
            max_model_len=context.max_model_len,
            vocab_size=context.vocab_size,
            device=context.device,
        )
        self._processors = core_processors(facts, context.logits_processors)
        self._wanted: dict[int, list[LogitsProcessor]] = {}
        self._params: dict[int, SamplingParams] = {}
        self._seeds = np.zeros(context.max_num_rows, np.int64)
        self._knobs = Knobs(torch.from_numpy(self._seeds), torch.zeros(context.max_num_rows, 4, dtype=torch.float64))
        self._has_kernel = context.device.type == "cpu" and native.library() is not None
        self._pass: _Pass | None = None

    def admit(self, admit: RowAdmit) -> None:
        self.release(admit.row)
        params = admit.params
        if not isinstance(params, SamplingParams):
            return
        self._params[admit.row] = params
        self._seeds[admit.row] = (admit.seed + (1 << 63)) % (1 << 64) - (1 << 63)
        if self._has_kernel:
            self._knobs.values[admit.row] = torch.tensor(self._values(params), dtype=torch.float64)
        wanted = [p for p in self._processors if p.wants(params) and not (params.is_greedy and p.keeps_argmax)]
        for processor in wanted:
            processor.admit(admit)
        self._wanted[admit.row] = wanted

    def _values(self, params: SamplingParams) -> tuple[float, float, float, float]:
        """As Knobs has them."""
        inverse = 0.0 if params.is_greedy else float(np.float32(1.0 / params.temperature))
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        return inverse, top_k, params.top_p, float(np.float32(params.min_p))

    def release(self, row: int) -> None:
        self._pass = None
        self._params.pop(row, None)
        for processor in self._wanted.pop(row, ()):
            try:
                processor.release(row)
            except Exception:
                log.exception("a logits processor failed to release row %d", row)

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
        raw, failed = None, dict[int, str]()
        if now.logprobs_index is not None:
            raw = logits.index_select(0, now.logprobs_index)
        if now.processors:
            max_tokens = int(num_tokens.max()) if max_tokens is None else max_tokens
            logits = self._processed(logits, now, num_tokens, token_ids, max_tokens, failed)
        if self._has_kernel:
            tokens, best = draw_rows(logits, rows, num_tokens, self._knobs)
        else:
            tokens, best = self._drawn(logits, now, num_tokens)
        found = None
        if raw is not None and now.logprobs_index is not None:
            found = position_logprobs(raw, tokens[now.logprobs_index], max(now.num_top))
        return SampledTokens(tokens, best, now.host_rows, found, now.logprobs_at, now.num_top, failed)

    def _prepared(self, host_rows: tuple[int, ...]) -> _Pass:
        """What these rows need; the last answer while nothing was admitted or released."""
        if self._pass is None or self._pass.host_rows != host_rows:
            self._pass = self._prepare(host_rows)
        return self._pass

    def _prepare(self, host_rows: tuple[int, ...]) -> _Pass:
        params = [self._params[row] for row in host_rows]
        kinds = ["" if self._has_kernel else self._kind(p) for p in params]
        asking = [(at, p.logprobs) for at, p in enumerate(params) if p.logprobs is not None]
        logprobs_at = [at for at, _ in asking]
        return _Pass(
            host_rows,
            self._group([at for at, kind in enumerate(kinds) if kind == "greedy"], params, host_rows),
            self._group([at for at, kind in enumerate(kinds) if kind == "plain"], params, host_rows),
            self._group([at for at, kind in enumerate(kinds) if kind == "cut"], params, host_rows),
            self._active_processors(host_rows),
            tuple(logprobs_at),
            to_device(logprobs_at, np.int64, self._device) if asking else None,
            tuple(num for _, num in asking),
        )

    def _kind(self, params: SamplingParams) -> str:
        if params.is_greedy:
            return "greedy"
        is_cut = 0 < params.top_k < self._vocab_size or params.top_p < 1 or params.min_p > 0
        return "cut" if is_cut else "plain"

    def _group(self, host_at: list[int], params: list[SamplingParams], host_rows: tuple[int, ...]) -> _Group | None:
        if not host_at:
            return None
        device, mine = self._device, [params[at] for at in host_at]
        top_k = [p.top_k if 0 < p.top_k < self._vocab_size else self._vocab_size for p in mine]
        top_p = [p.top_p for p in mine]
        cuts = Cuts(
            inverse_temperature=to_device([1.0 / (p.temperature or 1.0) for p in mine], np.float32, device),
            top_k=to_device(top_k, np.int64, device),
            top_p=to_device(top_p, np.float64, device),
            min_p=to_device([p.min_p for p in mine], np.float32, device),
            any_top_k=min(top_k) < self._vocab_size,
            any_top_p=min(top_p) < 1,
            any_min_p=max(p.min_p for p in mine) > 0,
        )
        at = to_device(host_at, np.int64, device) if len(host_at) < len(host_rows) else None
        return _Group(host_at, at, cuts, to_device(self._seeds[[host_rows[i] for i in host_at]], np.int64, device))

    def _active_processors(
        self, host_rows: tuple[int, ...]
    ) -> list[tuple[LogitsProcessor, Tensor, Tensor, tuple[int, ...]]]:
        active = []
        for processor in self._processors:
            places = [at for at, row in enumerate(host_rows) if processor in self._wanted[row]]
            if places:
                mine = tuple(host_rows[at] for at in places)
                index = to_device(places, np.int64, self._device), to_device(mine, np.int64, self._device)
                active.append((processor, *index, mine))
        return active

    def _processed(
        self,
        logits: Tensor,
        now: _Pass,
        num_tokens: Tensor,
        token_ids: Tensor,
        max_tokens: int,
        failed: dict[int, str],
    ) -> Tensor:
        """Run the processors; the rows of one that raises are put into `failed`, the others go on."""
        logits = logits.float()
        for processor, at, ids, host_ids in now.processors:
            rows = Rows(
                at=at,
                ids=ids,
                host_ids=host_ids,
                num_tokens=num_tokens[at],
                max_tokens=max_tokens,
                token_ids=token_ids,
            )
            try:
                logits = processor.apply(logits, rows)
            except Exception as error:
                log.exception("logits processor %s failed", type(processor).__name__)
                failed |= dict.fromkeys(host_ids, f"a logits processor failed: {type(error).__name__}: {error}")
        return logits

    def _drawn(self, logits: Tensor, now: _Pass, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [R] int64 and each row's largest logit [R] float32."""
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        best = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        for group, draw in ((now.greedy, _draw_greedy), (now.plain, _draw_plain), (now.cut, draw_cut)):
            if group is not None:
                self._draw_group(logits, group, draw, num_tokens, tokens, best)
        return tokens, best

    def _draw_group(
        self,
        logits: Tensor,
        group: _Group,
        draw: Callable[[Tensor, Cuts, Tensor], tuple[Tensor, Tensor]],
        num_tokens: Tensor,
        tokens: Tensor,
        best: Tensor,
    ) -> None:
        """Draw for the group's rows, some at a time."""
        uniform = uniforms(group.seeds, num_tokens if group.at is None else num_tokens[group.at])
        for start in range(0, len(group.host_at), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            x = logits[part] if group.at is None else logits[group.at[part]]
            drawn, value = draw(x.float(), group.cuts.take(part), uniform[part])
            if group.at is None:
                tokens[part], best[part] = drawn, value
            else:
                tokens[group.at[part]], best[group.at[part]] = drawn, value


def _draw_greedy(x: Tensor, cuts: Cuts, uniform: Tensor) -> tuple[Tensor, Tensor]:
    best, tokens = first_max(x)
    return tokens, best


def _draw_plain(x: Tensor, cuts: Cuts, uniform: Tensor) -> tuple[Tensor, Tensor]:
    best, _ = first_max(x)
    parts = [
        pick(weights(probabilities(x[part], best[part], cuts.inverse_temperature[part])), uniform[part])
        for part in slices(x)
    ]
    return torch.cat(parts), best
