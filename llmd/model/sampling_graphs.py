"""What follows the logits of a recorded decode step, recorded too: tokens drawn, handed to the next step and sent home.

A sampler takes part that tells what its launches hang on (`launches`); there is a graph for each size of step and each kind
of launches, recorded when it is first wanted, which takes a millisecond or two.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmd.model.batch import RowArrays
from llmd.model.graphs import LATER_S, Capture, Captured, Key, Recorded
from llmd.model.sampler import PendingTokens, SampledTokens, Sampler
from llmd.model.staging import Outbox, Ring
from llmd_kernels.sampling import deliver

log = logging.getLogger("llmd.model")

_MAX_GRAPHS = 512  # those used longest ago make room


class SamplingGraphs:
    """The graphs of one model's sampler. The executor thread's own."""

    def __init__(self, sampler: Sampler, rows: RowArrays, capture: Capture, outbox: Outbox) -> None:
        self._sampler, self._rows, self._capture, self._outbox = sampler, rows, capture, outbox
        self._launches: Callable[[tuple[int, ...]], Hashable | None] | None = getattr(sampler, "launches", None)
        self._graphs: OrderedDict[tuple[Key, Hashable], Captured] = OrderedDict()
        self._refused: dict[Hashable, float] = {}  # kinds, and until when: what found no memory is tried again
        size = 2 * rows.max_num_rows
        self._out = torch.zeros(size, dtype=torch.int32, device=rows.device)
        self._landings = Ring(size, torch.int32, rows.device)

    def draw(self, step: Recorded, host_rows: Sequence[int]) -> PendingTokens | None:
        """The tokens of a step's rows, on their way; None where the sampler must be called as for any other step."""
        host_rows = tuple(host_rows)
        launches = self._launches(host_rows) if self._launches is not None else None
        if launches is None or (self._refused and self._refused.get(launches, 0.0) > time.monotonic()):
            return None
        size, key = step.key.size, (step.key, launches)
        self._outbox.hold()  # the last step's tokens may still be leaving
        out = self._out[: 2 * size].view(2, size)
        if (graph := self._graphs.get(key)) is not None:
            self._graphs.move_to_end(key)
            graph.replay()
        else:
            self._record(key, lambda: self._sample(step, host_rows, out))
        sampled = SampledTokens(out[0], out[1].view(torch.float32), host_rows, None, (), ())
        return PendingTokens(sampled, self._outbox.send(out.view(-1), self._landings.next()[: 2 * size]), size)

    def clear(self) -> None:
        """Memory that the graphs know has moved."""
        self._graphs.clear()

    def _sample(self, step: Recorded, host_rows: tuple[int, ...], out: Tensor) -> Tensor:
        rows, token_ids, max_tokens = step.batch.rows, self._rows.token_ids, step.batch.max_seq_len
        sampled = self._sampler.sample(
            step.logits, rows, step.num_tokens, token_ids, host_rows=host_rows, max_tokens=max_tokens
        )
        return deliver(sampled.token_ids, sampled.best, rows, step.num_tokens, token_ids, out)

    def _record(self, key: tuple[Key, Hashable], work: Callable[[], Tensor]) -> None:
        _, captured, why_not = self._capture.record(work)
        if captured is None:
            log.info("sampling is not recorded: %s", why_not or "no memory is left; it is tried again later")
            self._refused[key[1]] = math.inf if why_not else time.monotonic() + LATER_S
            return
        self._graphs[key] = captured
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)


class NoSamplingGraphs:
    """Where steps are sampled as they come."""

    def draw(self, step: Recorded, host_rows: Sequence[int]) -> Any:
        """Nothing is recorded."""
        return None

    def clear(self) -> None:
        """There are none."""
