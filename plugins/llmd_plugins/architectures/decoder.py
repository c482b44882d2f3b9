"""The pre-norm decoder that Llama, Mistral and the Qwens share; what differs is asked of the config or passed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Batch, Layers


class Attention(nn.Module):
    """q, k, v → rotary → attention over the cache → output; `qk_norm` normalises each query and key head."""

    def __init__(
        self, config: ArchitectureConfig, layers: Layers, index: int, *, qkv_bias: bool, o_bias: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.qkv_proj = layers.qkv(bias=qkv_bias)
        self.o_proj = layers.output(config.num_heads * config.head_dim, bias=o_bias)
        self.q_norm = layers.norm(config.head_dim) if qk_norm else None
        self.k_norm = layers.norm(config.head_dim) if qk_norm else None
        self.rotary = layers.rotary()
        self.attend = layers.attention(index)
        self.split = layers.split_qkv

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.split(self.qkv_proj(x))
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        return self.o_proj(self.attend(q, k, v, batch, rotary=self.rotary, norms=norms))


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)); `size`: the features within, by default intermediate_size."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, size: int | None = None) -> None:
        super().__init__()
        self.gate_up_proj = layers.gate_up(bias=config.mlp_bias, size=size)
        self.activation = layers.activation()
        self.down_proj = layers.output(size or config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_up_proj(x, self.activation))


class MixedLayer(NamedTuple):
    """What stands in for a layer's MLP, under which name."""

    name: str
    module: nn.Module


Mixed = Callable[[int], "MixedLayer | None"]  # by the layer's index; None: an MLP


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the additions are folded into the norms."""

    def __init__(
        self, config: ArchitectureConfig, layers: Layers, index: int, mixed: Mixed | None = None, **attention: bool
    ) -> None:
        super().__init__()
        self.input_layernorm = layers.norm()
        self.self_attn = Attention(config, layers, index, **attention)
        self.post_attention_layernorm = layers.norm()
        name, module = (mixed(index) if mixed is not None else None) or ("mlp", MLP(config, layers))
        self.add_module(name, module)
        self._mlp = name

    def forward(self, x: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, batch)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self._modules[self._mlp](x), residual  # type: ignore[misc]


class Decoder(nn.Module):
    """embedding, N × layer, norm."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, mixed: Mixed | None = None, **attention: bool) -> None:
        super().__init__()
        self.embed_tokens = layers.embedding()
        indices = range(config.num_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, layers, index, mixed, **attention) for index in indices)
        self.norm = layers.norm()

    def forward(self, batch: Batch) -> Tensor:
        x, residual = self.embed_tokens(batch.input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, batch)
        x, _ = self.norm.add(x, residual)
        return x


class CausalLM(nn.Module):
    """A decoder and its head."""

    ignored_weights: tuple[str, ...] = ("*rotary_emb.inv_freq",)

    def __init__(
        self,
        config: ArchitectureConfig,
        layers: Layers,
        *,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm: bool = False,
        mixed: Mixed | None = None,
    ) -> None:
        super().__init__()
        self.model = Decoder(config, layers, mixed, qkv_bias=qkv_bias, o_bias=o_bias, qk_norm=qk_norm)
        self.lm_head = layers.lm_head(self.model.embed_tokens)
        if config.tie_word_embeddings:
            self.ignored_weights = (*self.ignored_weights, "lm_head.weight")

    def forward(self, batch: Batch) -> Tensor:
        """[T, hidden_size], normalised."""
        return self.model(batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] → [N, vocab_size] float32."""
        return self.lm_head(hidden)
