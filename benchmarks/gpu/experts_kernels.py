"""Mixtures of experts at the sizes of Mixtral 8x7B and Qwen3-30B-A3B; bytes are those of the experts that tokens chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.gpu.setting import Setting, Work
from llmd_kernels.experts import ExpertWeights, Fp8Weight, Stack, Weight, experts, route
from llmd_kernels.fp8_linear import quantize_weight
from llmd_kernels.grouped_linear import pack


class _Size(NamedTuple):
    """A layer's."""

    experts: int
    chosen: int
    hidden: int
    size: int


_MIXTRAL, _QWEN3, _TINY = _Size(8, 2, 4096, 14336), _Size(128, 8, 2048, 768), _Size(4, 2, 64, 32)
_BITS = {"bf16": 16, "fp8": 8, "int4": 4.5}


def _weight(form: str, width: int, depth: int, device: torch.device) -> Weight:
    dense = torch.randn(width, depth, device=device).mul_(depth**-0.5).bfloat16()
    if form == "fp8":
        return Fp8Weight(*quantize_weight(dense), None, "token" if device.type == "cuda" else "float", None)
    if form == "int4":
        codes = torch.randint(0, 16, (width, depth), dtype=torch.uint8, device=device)
        scale = torch.full((width, depth // 32), depth**-0.5 / 8, device=device)
        return pack(codes, scale, bits=4, group_size=32, zero=8)
    return dense


def _weights(form: str, count: int, width: int, depth: int, device: torch.device) -> ExpertWeights:
    each: list[Weight] = []
    stack = Stack(count)
    for number in range(count):
        each.append(_weight(form, width, depth, device))
        stack.take(number, each[-1])
    return ExpertWeights(each, stack.weight)


def _experts(size: _Size, num_tokens: int, form: str = "bf16") -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        count, chosen, hidden, inner = _TINY if setting.is_tiny else size
        tokens = min(num_tokens, 20) if setting.is_tiny else num_tokens
        gate_up = _weights(form, count, 2 * inner, hidden, setting.device)
        down = _weights(form, count, hidden, inner, setting.device)
        x = torch.randn(tokens, hidden, device=setting.device).bfloat16()
        ids, weights = route(torch.randn(tokens, count), chosen, normalized=True)
        touched = len(ids.unique())
        plain = _plain(x, ids, weights.to(setting.device), gate_up, down) if form == "bf16" else None
        ids, weights = ids.to(setting.device), weights.to(setting.device)
        num_bytes = int(touched * 3 * inner * hidden * _BITS[form] / 8) + 4 * x.numel()
        return Work(
            lambda: experts(x, ids, weights, gate_up, down),
            plain,
            num_bytes,
            6 * tokens * chosen * inner * hidden,
        )

    return make


def _plain(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: ExpertWeights, down: ExpertWeights
) -> Callable[[], torch.Tensor]:
    """One expert after another; `ids` are on the host, where what each is to do is found out before it is measured."""
    places = [
        (number, *(at.to(x.device) for at in (ids == number).nonzero(as_tuple=True))) for number in ids.unique().tolist()
    ]

    def run() -> torch.Tensor:
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number, tokens, slots in places:
            gate, up = F.linear(x.index_select(0, tokens), gate_up.each[number]).chunk(2, dim=1)
            y = F.linear(F.silu(gate) * up, down.each[number])
            total.index_add_(0, tokens, y.float() * weights[tokens, slots].unsqueeze(1))
        return total.to(x.dtype)

    return run


def _route(num_tokens: int) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        tokens = min(num_tokens, 20) if setting.is_tiny else num_tokens
        logits = torch.randn(tokens, _QWEN3.experts, device=setting.device).bfloat16()

        def plain() -> None:
            weights, _ = logits.float().softmax(1).topk(_QWEN3.chosen, dim=1)
            weights /= weights.sum(1, keepdim=True)

        return Work(lambda: route(logits, _QWEN3.chosen, normalized=True), plain, 2 * logits.numel())

    return make


MAKE = {
    "experts, Mixtral, 1 token": _experts(_MIXTRAL, 1),
    "experts, Mixtral, 64 tokens": _experts(_MIXTRAL, 64),
    "experts, Mixtral, 8192 tokens": _experts(_MIXTRAL, 8192),
    "experts, Qwen3-30B-A3B, 1 token": _experts(_QWEN3, 1),
    "experts, Qwen3-30B-A3B, 64 tokens": _experts(_QWEN3, 64),
    "experts, Qwen3-30B-A3B, 8192 tokens": _experts(_QWEN3, 8192),
    "experts in int4, Mixtral, 1 token": _experts(_MIXTRAL, 1, "int4"),
    "experts in int4, Mixtral, 64 tokens": _experts(_MIXTRAL, 64, "int4"),
    "experts in fp8, Mixtral, 64 tokens": _experts(_MIXTRAL, 64, "fp8"),
    "experts in fp8, Mixtral, 8192 tokens": _experts(_MIXTRAL, 8192, "fp8"),
    "route, 8192 tokens to 8 of 128": _route(8192),
}
