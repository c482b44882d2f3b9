"""A mixture of experts: many gated MLPs, of which each token uses the few that a router chose.

Every expert is made of ordinary linears, so whatever reads or quantizes linears serves experts too (Shazeer et al. 2017,
arXiv:1701.06538). What they hold is multiplied all at once where their format allows: on a GPU it lies in one tensor for
all experts of a layer, of which the linears' own are views.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import nn

from llmd.model.layers.linear import Linear
from llmd_kernels.experts import Activation, ExpertWeights, Stack, Weight, experts, why_not
from llmd_kernels.experts import route as route
from llmd_kernels.experts.reference import by_expert

log = logging.getLogger("llmd.model")

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What the kernels call a config's hidden_act."""


class Expert(nn.Module):
    """down(act(gate(x)) · up(x)), its linears named as the checkpoint names them."""

    def __init__(
        self, gate_up: Linear, down: Linear, down_name: str, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        gate_up.is_routed = down.is_routed = True
        self.gate_up = gate_up
        self.add_module(down_name, down)
        self._down = down_name
        self.activation = activation

    @property
    def down(self) -> Linear:
        """The linear back, whatever its name."""
        return self._modules[self._down]  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] → the same."""
        result: torch.Tensor = self.down(self.activation(self.gate_up(x)))
        return result


class Experts(nn.ModuleList):
    """The experts of one layer, named by their numbers; `activation` is theirs, for kernels that compute it on the way."""

    def __init__(self, modules: Iterable[nn.Module] = (), activation: Activation | None = None) -> None:
        super().__init__(modules)
        self._activation = activation
        self._weights: tuple[ExpertWeights, ExpertWeights] | None = None
        self._is_known = activation is None  # whether that is all there will be
        self._linears: tuple[_Linears, ...] = ()
        if activation is not None:
            all_experts = [expert for expert in self if isinstance(expert, Expert)]
            self._linears = _Linears([expert.gate_up for expert in all_experts]), _Linears([e.down for e in all_experts])

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size], ids [T, k] int64, weights [T, k] float32 → [T, hidden_size]: the weighted sum of k experts.

        A token's experts are added up in float32 in an order that is its own, whatever else is in the batch.
        """
        if not self._is_known:
            self._weights, self._is_known = self._find_weights(), True
        if self._weights is not None and self._activation is not None:
            y = experts(x, ids, weights, *self._weights, self._activation)
            reduce = self._linears[1].all[0].reduce
            return y if reduce is None else reduce.reduce(y)
        return self._all_of_them(x, ids, weights) if x.is_cuda else self._one_after_another(x, ids, weights)

    def _find_weights(self) -> tuple[ExpertWeights, ExpertWeights] | None:
        """What the kernels multiply with; None where they cannot."""
        gate_up, down = (linears.weights() for linears in self._linears)
        device = self._linears[0].all[0].device
        if gate_up is not None and down is not None and (reason := why_not(gate_up, down, device)) is None:
            return gate_up, down
        if device.type == "cuda":
            reason = "no kernel for this format" if gate_up is None or down is None else reason
            _say_slow(type(self._linears[0].all[0].method).__name__, reason or "")
        return None

    def _one_after_another(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Each expert sees its own tokens; which they are must be known to the host."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number, tokens, slots in by_expert(ids):
            y = self[number](x[tokens]).float() * weights[tokens, slots].unsqueeze(1)
            total.index_add_(0, tokens, y)
        return total.to(x.dtype)

    def _all_of_them(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert sees every token: far more than is needed, but a GPU's host waits for nothing."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number, expert in enumerate(self):
            chosen = ids == number
            weight = (weights * chosen).sum(1, keepdim=True)
            total += torch.where(chosen.any(1, keepdim=True), expert(x).float() * weight, 0.0)
        return total.to(x.dtype)


class _Linears:
    """One linear of every expert. On a GPU each moves its weight into the stack as soon as it is whole."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.all = linears
        self._stack = Stack(len(linears))
        for number, linear in enumerate(linears):
            if linear.device.type == "cuda":
                linear.finished = partial(self._take, number)

    def _take(self, number: int, linear: Linear) -> None:
        if (weight := _weight_of(linear)) is not None:
            self._stack.take(number, weight)

    def weights(self) -> ExpertWeights | None:
        """None where a format has no weight for the kernels, or experts differ."""
        found = [weight for linear in self.all if (weight := _weight_of(linear)) is not None]
        if len(found) < len(self.all):
            return None
        try:
            return ExpertWeights(found, self._stack.weight)
        except ValueError as error:
            log.info("experts of %s are computed one by one: %s", self.all[0].name, error)
            return None


def _weight_of(linear: Linear) -> Weight | None:
    """What its method says; nothing where a bias is added to it."""
    find = getattr(linear.method, "expert_weight", None)
    return None if find is None or linear._parameters.get("bias") is not None else find(linear)


_said: set[tuple[str, str]] = set()


def _say_slow(method: str, reason: str) -> None:
    """Once for each method and reason."""
    if (method, reason) not in _said:
        _said.add((method, reason))
        log.warning("every token goes through every expert, which is slow: %s has %s", method, reason)
