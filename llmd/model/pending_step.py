"""A step that is launched: what will come of it, and how it becomes plain data."""

from __future__ import annotations

import time

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
        prompt_logprobs: dict[int, list[TokenLogprobs]] | None = None,
        pooled: dict[int, Tensor] | None = None,
        errors: dict[int, str] | None = None,
    ) -> None:
        self._plan = plan
        self._started_s = started_s
        self._tokens = tokens
        self._prompt_logprobs = prompt_logprobs or {}
        self._pooled = pooled or {}
        self._errors = errors or {}

    def result(self) -> StepResult:
        """Wait for the device and turn what it computed into plain data."""
        host = self._tokens.result() if self._tokens is not None else None
        errors = self._errors
        pooled = {}
        for row, vector in self._pooled.items():
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
            prompt_logprobs=self._prompt_logprobs,
            pooled=pooled,
            errors=errors,
            forward_s=time.perf_counter() - self._started_s,
        )
