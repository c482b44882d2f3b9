"""x ← x + attention(norm(x)) + mlp(norm(x)), with a learnt gate on the attention of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmd.api.v1 import Layer

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Batch, Layers


class HeadGates(Layer):
    """A parameter that llmd has no layer for: one number a head."""

    def __init__(self, num_heads: int, layers: Layers) -> None:
        super().__init__()
        self.device = layers.device  # where the loader puts it
        self.add_parameter("gate", (num_heads,), layers.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H·D] → the same, each head times the sigmoid of its gate."""
        heads = x.view(x.shape[0], self.gate.shape[0], -1)
        return (heads * self.gate.sigmoid().unsqueeze(1)).flatten(1)


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, index: int) -> None:
        super().__init__()
        self.norm = layers.norm()
        self.qkv_proj, self.o_proj = layers.qkv(), layers.output(config.num_heads * config.head_dim)
        self.gates = HeadGates(config.num_heads, layers)
        self.gate_up_proj, self.down_proj = layers.gate_up(), layers.output(config.intermediate_size)
        self.activation, self.rotary = layers.activation(), layers.rotary()
        self.attend, self.split = layers.attention(index), layers.split_qkv

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        y = self.norm(x)
        q, k, v = self.split(self.qkv_proj(y))
        self.rotary(batch.positions, q, k)
        attended = self.gates(self.attend(q, k, v, batch).flatten(1))
        return x + self.o_proj(attended) + self.down_proj(self.activation(self.gate_up_proj(y)))


class AcmeParallelForCausalLM(nn.Module):
    """Named as its checkpoint is: embed, blocks.N, norm, head."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        self.embed = layers.embedding()
        self.blocks = nn.ModuleList(Block(config, layers, index) for index in range(config.num_layers))
        self.norm = layers.norm()
        self.head = layers.lm_head(self.embed)

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed(batch.input_ids)
        for block in self.blocks:
            x = block(x, batch)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)
