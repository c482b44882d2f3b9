"""Decoders whose MLPs are mixtures of experts, behind a router that chooses a few for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmd.api.v1 import ModelError, route
from llmd_kernels.experts import add_gated
from llmd_plugins.architectures.decoder import MLP, MixedLayer

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers

_MOST = 4096  # experts of a layer


class Mixture(nn.Module):
    """Σ weight · expert(x) over the experts that the router chose, and what a shared expert adds for every token."""

    def __init__(
        self,
        config: ArchitectureConfig,
        layers: Layers,
        *,
        count_keys: Sequence[str],
        size: int,
        normalized: bool,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        shared_size: int = 0,
    ) -> None:
        super().__init__()
        count = whole(config, *count_keys, most=_MOST)
        self.num_chosen = whole(config, "num_experts_per_tok", most=count)
        self.normalized = normalized
        self.gate = layers.router(count)
        self.experts = layers.experts(count, size, names=names)
        self.shared_expert = MLP(config, layers, shared_size) if shared_size else None
        self.shared_expert_gate = layers.router(1) if shared_size else None

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = route(self.gate(x), self.num_chosen, normalized=self.normalized)
        y: Tensor = self.experts(x, ids, weights)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return y
        return add_gated(y, self.shared_expert(x), self.shared_expert_gate(x))


class MixtralLayers:
    """Every layer is a mixture; the probabilities of the chosen experts add up to 1."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        self._config, self._layers = config, layers

    def __call__(self, index: int) -> MixedLayer | None:
        mixture = Mixture(
            self._config,
            self._layers,
            count_keys=("num_local_experts",),
            size=self._config.intermediate_size,
            normalized=True,
            names=("w1", "w3", "w2"),
        )
        return MixedLayer("block_sparse_moe", mixture)


class QwenLayers:
    """Mixtures in every `decoder_sparse_step`th layer but those of `mlp_only_layers`; Qwen2's with a shared expert."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, *, is_shared: bool) -> None:
        self._config, self._layers = config, layers
        self._step = whole(config, "decoder_sparse_step", default=1, most=1 << 20)
        self._plain = _indices(config, "mlp_only_layers")
        self._shared_size = whole(config, "shared_expert_intermediate_size", most=1 << 24) if is_shared else 0

    def __call__(self, index: int) -> MixedLayer | None:
        if index in self._plain or (index + 1) % self._step:
            return None
        mixture = Mixture(
            self._config,
            self._layers,
            count_keys=("num_experts", "num_local_experts"),
            size=whole(self._config, "moe_intermediate_size", most=1 << 24),
            normalized=bool(self._config.raw.get("norm_topk_prob", False)),
            shared_size=self._shared_size,
        )
        return MixedLayer("mlp", mixture)


def whole(config: ArchitectureConfig, *keys: str, most: int, default: int | None = None) -> int:
    """A whole number from 1 to `most` of config.json, under the first of the keys that is there. Raises ModelError."""
    value = next((config.raw[key] for key in keys if key in config.raw), default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ModelError(f"config.json: {' or '.join(keys)} must be a whole number from 1 to {most}, got {value!r}")
    return value


def _indices(config: ArchitectureConfig, key: str) -> Sequence[int]:
    value: Any = config.raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(index, int) for index in value):
        raise ModelError(f"config.json: {key} must be a list of layers' numbers, got {value!r}")
    return value
