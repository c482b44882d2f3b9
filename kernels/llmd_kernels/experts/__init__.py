"""A mixture of experts: y = Σ weight · down(act(gate(x)) · up(x)) over the k experts that a router chose for each token.

Sums over a token's experts are float32, in the order of its slots, whatever else is in the batch. On a GPU nothing waits
and every launch hangs on the number of tokens alone, so graphs capture it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal

import torch

from llmd_kernels import native
from llmd_kernels.experts import cpu, reference
from llmd_kernels.experts.weights import ExpertWeights as ExpertWeights
from llmd_kernels.experts.weights import Fp8Weight as Fp8Weight
from llmd_kernels.experts.weights import Stack as Stack
from llmd_kernels.experts.weights import Weight as Weight
from llmd_kernels.silu_mul import gelu_mul, silu_mul

Activation = Literal["silu", "gelu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu_mul,
    "gelu": gelu_mul,
    "gelu_tanh": lambda x: gelu_mul(x, tanh=True),
}

_MOST_ROUTED = 4096  # experts that fit a program's registers, and the room of a CPU's


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    activation: Activation = "silu",
) -> torch.Tensor:
    """x [T, H], ids [T, k] int64 from 0 to E - 1, weights [T, k] float32 → [T, H] in x's dtype.

    gate_up: of E experts [2·I, H], the gate's rows first; down: of as many [H, I]. An id outside is not looked for: it reads
    nothing and its sum is undefined. Raises ValueError for shapes, dtypes or devices that do not go together.
    """
    _check(x, ids, weights, gate_up, down, activation)
    if x.shape[0] == 0:
        return torch.empty_like(x)
    way = _way(x, gate_up, down)
    if way is None:
        return reference.experts(x, ids, weights, gate_up, down, _ACTIVATIONS[activation])
    result: torch.Tensor = way.experts(x, ids, weights, gate_up, down, activation)
    return result


def route(logits: torch.Tensor, num_chosen: int, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] → ids [T, k] int64 and weights [T, k] float32: the likeliest experts and their probabilities.

    The likeliest comes first, of equal ones that of the lowest number; with `normalized` a token's weights add up to 1.
    Raises ValueError for what is no matrix, or a k that is not from 1 to E.
    """
    if logits.dim() != 2 or not 1 <= num_chosen <= logits.shape[1]:
        raise ValueError(f"route wants logits [T, E] and k from 1 to E, got {list(logits.shape)} and {num_chosen}")
    if logits.is_cuda and logits.shape[0] and logits.shape[1] <= _MOST_ROUTED:
        ids, weights = _on_gpu().route(logits, num_chosen, normalized=normalized)
        return ids, weights
    if native.is_available(logits) and logits.shape[1] <= _MOST_ROUTED:
        return cpu.route(logits, num_chosen, normalized=normalized)
    return reference.route(logits, num_chosen, normalized=normalized)


def add_gated(y: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """y + sigmoid(gate) · x, what an expert adds that all tokens share: y and x [T, H], gate [T, 1] → [T, H].

    Raises ValueError for shapes or dtypes that do not go together.
    """
    if y.dim() != 2 or y.shape != x.shape or gate.shape != (y.shape[0], 1) or not y.dtype == x.dtype == gate.dtype:
        raise ValueError(
            f"add_gated wants y and x [T, H] and gate [T, 1] of one dtype, got {y.dtype} {list(y.shape)}, "
            f"{x.dtype} {list(x.shape)} and {gate.dtype} {list(gate.shape)}"
        )
    if y.is_cuda and y.numel() and y.is_contiguous() and x.is_contiguous() and gate.is_contiguous():
        result: torch.Tensor = _on_gpu().add_gated(y, x, gate)
        return result
    return cpu.add_gated(y, x, gate) if native.is_available(y) else reference.add_gated(y, x, gate)


def why_not(gate_up: ExpertWeights, down: ExpertWeights, device: torch.device) -> str | None:
    """What keeps a device from computing all experts at once; None: nothing."""
    return None if device.type != "cuda" else _on_gpu().why_not(gate_up, down)


def _check(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    activation: str,
) -> None:
    if x.dim() != 2 or not x.dtype.is_floating_point or x.shape[1] != gate_up.in_features:
        raise ValueError(f"experts wants x [T, {gate_up.in_features}] of floats, got {x.dtype} {list(x.shape)}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0] or not ids.shape[1] or ids.dtype != torch.int64:
        raise ValueError(f"experts wants ids [{x.shape[0]}, k] int64, got {ids.dtype} {list(ids.shape)}")
    if weights.shape != ids.shape or weights.dtype != torch.float32:
        raise ValueError(f"experts wants weights {list(ids.shape)} float32, got {weights.dtype} {list(weights.shape)}")
    sizes = (gate_up.num_experts, 2 * down.in_features, down.out_features)
    if (down.num_experts, gate_up.out_features, gate_up.in_features) != sizes:
        raise ValueError(
            f"experts wants as many gate_up [2 I, H] as down [H, I], got {gate_up.num_experts} of [{gate_up.out_features}, "
            f"{gate_up.in_features}] and {down.num_experts} of [{down.out_features}, {down.in_features}]"
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"experts wants activation {' or '.join(_ACTIVATIONS)}, got {activation!r}")


def _way(x: torch.Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> ModuleType | None:
    """The module that has a kernel for these; None: the reference."""
    if x.is_cuda:
        return _on_gpu() if _on_gpu().why_not(gate_up, down) is None else None
    if native.is_available(x):
        return cpu if cpu.why_not(x, gate_up, down) is None else None
    return None


def _on_gpu() -> ModuleType:
    """Triton is imported only where there is a GPU."""
    from llmd_kernels.experts import triton

    return triton
