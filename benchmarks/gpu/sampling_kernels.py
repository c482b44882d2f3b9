"""Sampling of 64 rows by what they ask for, beside the torch sampler on the same device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.setting import Setting, Work
from llmd.engine.params import SamplingParams
from llmd.engine.step import RowAdmit
from llmd.model.sampler import Sampler, SamplerContext, TorchSampler

_ROWS, _TOKENS = 64, 512
_WISHES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_p": {"top_p": 0.9},
    "top_k, top_p": {"top_k": 20, "top_p": 0.8},
    "penalties, bias": {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {5: 1.0}},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


def _sampler(setting: Setting, context: SamplerContext) -> Sampler:
    """The one that this device would have."""
    if setting.device.type == "cpu":
        return TorchSampler(context)
    from llmd.model.sampler_triton import TritonSampler

    return TritonSampler(context)


def _make(wishes: dict[str, Any]) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        width, device, num_rows = config["vocab_size"], setting.device, 3 if setting.is_tiny else _ROWS
        context = SamplerContext(max_num_rows=num_rows, max_model_len=_TOKENS, vocab_size=width, device=device)
        logits = torch.randn(num_rows, width, device=device) * 6
        token_ids = torch.randint(width, (num_rows, _TOKENS), dtype=torch.int32, device=device)
        rows, counts = torch.arange(num_rows, device=device), torch.full((num_rows,), _TOKENS, device=device)

        def drawing(sampler: Sampler) -> Callable[[], Any]:
            for row in range(num_rows):
                sampler.admit(
                    RowAdmit(
                        row=row, seq_id=row, request_id="", token_ids=(1,), num_prompt_tokens=_TOKENS // 2,
                        params=SamplingParams(**wishes), seed=row,
                    )
                )  # fmt: skip
            known: dict[str, Any] = {"host_rows": list(range(num_rows)), "max_tokens": _TOKENS}
            return lambda: sampler.sample(logits, rows, counts, token_ids, **known)

        return Work(drawing(_sampler(setting, context)), drawing(TorchSampler(context)), 4 * logits.numel())

    return make


MAKE = {f"sampling: {name}": _make(wishes) for name, wishes in _WISHES.items()}
