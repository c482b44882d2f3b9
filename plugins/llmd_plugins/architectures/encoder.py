"""The post-norm encoder that BERT and RoBERTa share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmd.api.v1 import ModelError

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Batch, Layers


def number(config: ArchitectureConfig, key: str, default: float) -> float:
    """A number that only this family's config.json has."""
    value = config.raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ModelError(f"config.json: {key} must be a number of at least 0, got {value!r}")
    return value


def check_plain(config: ArchitectureConfig) -> None:
    """Variants that would load and compute something else are refused by name."""
    kind = config.raw.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise ModelError(f"config.json: position_embedding_type must be 'absolute', got {kind!r}")
    for key in ("is_decoder", "add_cross_attention"):
        if config.raw.get(key):
            raise ModelError(f"config.json: {key} must be false: this architecture is served as an encoder")


class Embeddings(nn.Module):
    """norm(word + position + token type); positions begin at `offset` in their table."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, *, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.num_types = int(number(config, "type_vocab_size", 2))
        self.word_embeddings = layers.embedding()
        self.position_embeddings = layers.embedding(config.max_position + offset)
        self.token_type_embeddings = layers.embedding(self.num_types)
        self.LayerNorm = layers.layer_norm(number(config, "layer_norm_eps", 1e-12))

    def forward(self, batch: Batch) -> Tensor:
        x = self.word_embeddings(batch.input_ids) + self.position_embeddings(batch.positions + self.offset)
        if batch.token_types is None:
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(batch.token_types.clamp(max=self.num_types - 1))
        return self.LayerNorm(x)


class SelfAttention(nn.Module):
    """q, k, v → attention among the tokens of a sequence."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.qkv = layers.qkv(bias=True, names=("query", "key", "value"))
        self.attend = layers.encoder_attention()
        self.split = layers.split_qkv

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        return self.attend(q, k, v, batch)


class Output(nn.Module):
    """norm(dense(x) + residual)."""

    def __init__(self, layers: Layers, in_features: int, eps: float) -> None:
        super().__init__()
        self.dense = layers.output(in_features, bias=True)
        self.LayerNorm = layers.layer_norm(eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class EncoderLayer(nn.Module):
    """x = norm(x + attention(x)), then x = norm(x + mlp(x))."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        eps = number(config, "layer_norm_eps", 1e-12)
        hidden = config.num_heads * config.head_dim
        # the names of the checkpoint
        self.attention = nn.ModuleDict({"self": SelfAttention(layers), "output": Output(layers, hidden, eps)})
        dense = layers.linear(config.hidden_size, config.intermediate_size, bias=True)
        self.intermediate = nn.ModuleDict({"dense": dense})
        self.output = Output(layers, config.intermediate_size, eps)
        self.activation = layers.plain_activation()

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, batch), x)
        return self.output(self.activation(self.intermediate["dense"](x)), x)


class Stack(nn.Module):
    """N layers."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config, layers) for _ in range(config.num_layers))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        for layer in self.layer:
            x = layer(x, batch)
        return x


class Encoder(nn.Module):
    """Embeddings and N layers, named as the checkpoint names them."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, *, offset: int) -> None:
        super().__init__()
        check_plain(config)
        self.embeddings = Embeddings(config, layers, offset=offset)
        self.encoder = Stack(config, layers)

    def forward(self, batch: Batch) -> Tensor:
        return self.encoder(self.embeddings(batch), batch)


class EncoderModel(nn.Module):
    """An encoder under the name that its checkpoints give it, with hidden states for vectors."""

    pooling = "cls"
    weight_spellings = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    ignored_weights: tuple[str, ...] = ("*position_ids", "cls.*", "lm_head.*", "*pooler.dense.*")

    def __init__(self, config: ArchitectureConfig, layers: Layers, name: str, *, offset: int = 0) -> None:
        super().__init__()
        self.base_name, self.weight_prefix = name, f"{name}."
        self.add_module(name, Encoder(config, layers, offset=offset))
        self.num_token_types = self.encoder.embeddings.num_types

    @property
    def encoder(self) -> Encoder:
        """The encoder, whatever it is called."""
        module = self._modules[self.base_name]
        assert isinstance(module, Encoder)
        return module

    def forward(self, batch: Batch) -> Tensor:
        """[T, hidden_size] of the last layer."""
        return self.encoder(batch)
