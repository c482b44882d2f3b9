"""From logits of a model's vocabulary to tokens: cuts, draws, penalties, masks and log-probabilities of 64 rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.setting import Setting, Work
from llmd_kernels import bitmask, logprobs, penalties, sampling

_ROWS, _TOKENS = 64, 512
_WISHES: dict[str, tuple[float, float, float, float]] = {  # 1 / temperature, top_k, top_p, min_p
    "greedy": (0.0, 1e6, 1.0, 0.0),
    "temperature": (1.25, 1e6, 1.0, 0.0),
    "top_p": (1.25, 1e6, 0.95, 0.0),
    "top_k, top_p": (1.25, 20.0, 0.8, 0.0),
    "min_p": (1.25, 1e6, 1.0, 0.05),
}
Make = Callable[[Setting, dict[str, Any]], Work]


class _Given:
    """Logits and rows of a step."""

    def __init__(self, setting: Setting, config: dict[str, Any]) -> None:
        self.num = 3 if setting.is_tiny else _ROWS
        self.width: int = config["vocab_size"]
        self.device = setting.device
        self.logits = torch.randn(self.num, self.width, device=self.device) * 4
        self.rows = torch.arange(self.num, device=self.device)
        self.counts = torch.full((self.num,), _TOKENS, device=self.device)
        self.token_ids = torch.randint(self.width, (self.num, _TOKENS + 1), dtype=torch.int32, device=self.device)


def _sample(name: str) -> Make:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        given, wish = _Given(setting, config), list(_WISHES[name])
        wish[1] = min(wish[1], given.width)
        values = torch.tensor([wish] * given.num, dtype=torch.float64, device=given.device)
        knobs = sampling.Knobs(torch.arange(given.num, device=given.device), values)
        flags: dict[str, Any] = {"any_drawn": wish[0] > 0, "any_top_k": wish[1] < given.width, "any_top_p": wish[2] < 1}
        call = (given.logits, given.rows, given.counts, knobs)
        return Work(
            lambda: sampling.sample(*call, **flags),
            lambda: sampling.reference.sample(*call),
            given.logits.nbytes,
            waits=True,
        )

    return make


def _penalties(setting: Setting, config: dict[str, Any]) -> Work:
    given = _Given(setting, config)
    facts = torch.tensor([[_TOKENS / 2, 1.1, 0.2, 0.5]] * given.num, device=given.device)
    scratch = penalties.new_scratch(given.num, given.width, given.device)
    starts = torch.arange(given.num + 1, dtype=torch.int32, device=given.device)
    bias = penalties.Bias(starts, given.rows, torch.ones(given.num, device=given.device))
    call = (given.rows, given.counts, given.token_ids, facts)
    return Work(
        lambda: penalties.penalise(given.logits, *call, scratch, bias),
        lambda: penalties.reference.penalise(given.logits, *call, bias),
        given.num * _TOKENS * 20,
        waits=True,
    )


def _logprobs(num_top: int) -> Make:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        given = _Given(setting, config)
        tokens = given.logits.argmax(-1)
        return Work(
            lambda: logprobs.token_logprobs(given.logits, tokens, num_top),
            lambda: logprobs.reference.token_logprobs(given.logits, tokens, num_top, None),
            given.logits.nbytes,
            waits=True,
        )

    return make


def _masks(setting: Setting, config: dict[str, Any]) -> Work:
    given = _Given(setting, config)
    width = -(-given.width // 32)
    words = torch.randint(-(1 << 31), 1 << 31, (given.num, width), dtype=torch.int64, device=given.device).to(torch.int32)
    return Work(
        lambda: bitmask.mask_logits(given.logits, given.rows, words),
        lambda: bitmask.reference.mask_logits(given.logits, given.rows, words),
        given.logits.nbytes // 2,
        waits=True,
    )


def _deliver(setting: Setting, config: dict[str, Any]) -> Work:
    given = _Given(setting, config)
    best, out = (
        torch.zeros(given.num, device=given.device),
        torch.zeros(2, given.num, dtype=torch.int32, device=given.device),
    )
    call = (given.rows, best, given.rows, given.counts, given.token_ids, out)
    return Work(lambda: sampling.deliver(*call), lambda: sampling.reference.deliver(*call), 20 * given.num, waits=True)


MAKE: dict[str, Make] = {
    **{f"sampling: {name}": _sample(name) for name in _WISHES},
    "penalties, bias": _penalties,
    "logprobs: 0 likeliest": _logprobs(0),
    "logprobs: 5 likeliest": _logprobs(5),
    "grammar masks": _masks,
    "deliver": _deliver,
}
