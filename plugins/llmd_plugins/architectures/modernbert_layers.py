"""The layers of ModernBERT: pre-norm, rotary positions, gated MLPs, attention that is local in most layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmd.api.v1 import ModelError
from llmd_plugins.architectures.encoder import number

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Batch, Layers


def _flag(config: ArchitectureConfig, key: str) -> bool:
    value = config.raw.get(key, False)
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def _norm(config: ArchitectureConfig, layers: Layers) -> nn.Module:
    return layers.layer_norm(number(config, "norm_eps", 1e-5), bias=_flag(config, "norm_bias"))


def _local_theta(config: ArchitectureConfig) -> float:
    ropes = config.raw.get("rope_parameters") or {}
    local = ropes.get("sliding_attention") or {}
    return float(local.get("rope_theta") or number(config, "local_rope_theta", 10000.0))


class Attention(nn.Module):
    """q, k, v in one → rotary of this kind of layer → attention, local where the layer has a window → output."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, index: int) -> None:
        super().__init__()
        window = config.windows[index]
        rope = config.rope if window is None else replace(config.rope, theta=_local_theta(config))
        self.Wqkv = layers.linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = layers.output(config.hidden_size, bias=config.attention_bias)
        self.rotary = layers.rotary(rope)
        self.attend = layers.encoder_attention(window=window)
        self.split = layers.split_qkv

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.split(self.Wqkv(x))
        self.rotary(batch.positions, q, k)
        return self.Wo(self.attend(q, k, v, batch))


class MLP(nn.Module):
    """Wo(act(first half of Wi(x)) · second half)."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        self.Wi = layers.linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.Wo = layers.output(config.intermediate_size, bias=config.mlp_bias)
        self.activation = layers.activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.Wo(self.activation(self.Wi(x)))


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the first layer's input is normalised already."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, index: int) -> None:
        super().__init__()
        self.attn_norm = _norm(config, layers) if index else nn.Identity()
        self.attn = Attention(config, layers, index)
        self.mlp_norm = _norm(config, layers)
        self.mlp = MLP(config, layers)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = x + self.attn(self.attn_norm(x), batch)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """norm(embedding), N layers, norm."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"tok_embeddings": layers.embedding(), "norm": _norm(config, layers)})
        self.layers = nn.ModuleList(EncoderLayer(config, layers, index) for index in range(config.num_layers))
        self.final_norm = _norm(config, layers)

    def forward(self, batch: Batch) -> Tensor:
        x = self.embeddings["norm"](self.embeddings["tok_embeddings"](batch.input_ids))
        for layer in self.layers:
            x = layer(x, batch)
        return self.final_norm(x)


class ModernBert(nn.Module):
    """Hidden states for vectors."""

    pooling = "cls"
    weight_prefix = "model."
    ignored_weights: tuple[str, ...] = ("head.*", "decoder.*")

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        self.model = Encoder(config, layers)

    def forward(self, batch: Batch) -> Tensor:
        """[T, hidden_size], normalised."""
        return self.model(batch)


class ModernBertClassifier(ModernBert):
    """classifier(norm(act(dense(pooled)))); config.json says whether the first token or the mean is pooled."""

    ignored_weights = ()

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__(config, layers)
        self.pooling = config.raw.get("classifier_pooling", "cls")
        if self.pooling not in ("cls", "mean"):
            raise ModelError(f"config.json: classifier_pooling must be 'cls' or 'mean', got {self.pooling!r}")
        dense = layers.linear(config.hidden_size, config.hidden_size, bias=_flag(config, "classifier_bias"))
        self.head = nn.ModuleDict({"dense": dense, "norm": _norm(config, layers)})
        self.activation = layers.plain_activation(
            config.raw.get("classifier_activation", "gelu"), key="classifier_activation"
        )
        self.classifier = layers.linear(config.hidden_size, len(config.labels), bias=True)
        self.dtype = layers.dtype

    def classify(self, vectors: Tensor) -> Tensor:
        """[N, hidden_size] → [N, num_labels]."""
        x = self.activation(self.head["dense"](vectors.to(self.dtype)))
        return self.classifier(self.head["norm"](x))
