"""A step that is launched: what will come of it, and how it becomes plain data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmd.engine.step import NONFINITE_STATES, StepPlan, StepResult, TokenLogprobs
from llmd.model.sampler import PendingTokens


class PendingStep:
    """A launched step; `result` may be asked for once."""

    def __init__(
        self,
        plan: StepPlan,
        started_s: float,
        tokens: PendingTokens | None = None,
        prompt_logprobs: Callable[[], dict[int, list[TokenLogprobs]]] = dict,
        pooled: Callable[[], dict[int, Tensor]] = dict,
        errors: dict[int, str] | None = None,
        end: Any = None,
    ) -> None:
        """`end` is an event to wait for where there are no tokens: steps may not pile up on a device."""
        self._plan = plan
        self._started_s = started_s
        self._tokens = tokens
        self._prompt_logprobs, self._pooled = prompt_logprobs, pooled
        self._errors = errors or {}
        self._end = end

    def result(self) -> StepResult:
        """Wait for the device and turn what it computed into plain data."""
        host = self._tokens.result() if self._tokens is not None else None
        if host is None and self._end is not None:
            self._end.synchronize()
        errors = self._errors
        pooled = {}
        for row, vector in self._pooled().items():
            if bool(torch.isfinite(vector).all()):
                pooled[row] = vector.numpy()
            else:
                errors.setdefault(row, NONFINITE_STATES)
        if host is not None:
            errors = {**host.errors, **errors}
        return StepResult(
            step_id=self._plan.step_id,
            token_ids=host.token_ids if host is not None else (),
            logprobs=host.logprobs if host is not None else {},
            prompt_logprobs=self._prompt_logprobs(),
            pooled=pooled,
            errors=errors,
            forward_s=time.perf_counter() - self._started_s,
        )
