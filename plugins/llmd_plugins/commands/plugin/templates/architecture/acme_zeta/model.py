"""The modules, named as the checkpoint names their weights. T: tokens of a step, whichever rows they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Batch, Layers


class Attention(nn.Module):
    """[T, hidden_size] → [T, hidden_size]; `attend` stores keys and values, and reads those of earlier steps."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, index: int) -> None:
        super().__init__()
        self.qkv_proj = layers.qkv()
        self.o_proj = layers.output(config.num_heads * config.head_dim)
        self.rotary, self.attend, self.split = layers.rotary(), layers.attention(index), layers.split_qkv

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.split(self.qkv_proj(x))
        self.rotary(batch.positions, q, k)  # in place
        return self.o_proj(self.attend(q, k, v, batch))


class MLP(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        self.gate_up_proj = layers.gate_up()
        self.activation = layers.activation()
        self.down_proj = layers.output(config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside the residual."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, index: int) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = layers.norm(), Attention(config, layers, index)
        self.post_attention_layernorm, self.mlp = layers.norm(), MLP(config, layers)

    def forward(self, x: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x, residual = self.post_attention_layernorm.add(self.self_attn(x, batch), residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Embedding, layers, norm."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        self.embed_tokens = layers.embedding()
        self.layers = nn.ModuleList(DecoderLayer(config, layers, index) for index in range(config.num_layers))
        self.norm = layers.norm()

    def forward(self, batch: Batch) -> Tensor:
        x, residual = self.embed_tokens(batch.input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, batch)
        return self.norm.add(x, residual)[0]


class ZetaForCausalLM(nn.Module):
    """A decoder and its head."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        self.model = Decoder(config, layers)
        self.lm_head = layers.lm_head(self.model.embed_tokens)

    def forward(self, batch: Batch) -> Tensor:
        """[T, hidden_size]."""
        return self.model(batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] of the positions that want logits → [N, vocab_size] float32."""
        return self.lm_head(hidden)
