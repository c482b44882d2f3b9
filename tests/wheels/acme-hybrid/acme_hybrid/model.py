"""x ← x + mix(norm(x)), then x ← x + mlp(norm(x)); `mix` is a gated linear recurrence in most layers, attention in some.

The recurrence is De et al.'s, "Griffin: Mixing Gated Linear Recurrences with Local Attention" (arXiv 2402.19427), §2.4:

    r_t = σ(W_r x_t + b_r)      a_t = exp(-8 softplus(Λ) r_t)
    i_t = σ(W_i x_t + b_i)      h_t = a_t ⊙ h_(t-1) + √(1 - a_t²) ⊙ (i_t ⊙ x_t)

after a short causal convolution, beside a GeLU gate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmd.api.v1 import Layer, linear_recurrence, short_convolution

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Batch, Layers

_SHARPNESS = 8.0


class Convolution(Layer):
    """A filter of `width` taps for each channel, over the row's own tokens."""

    weight: Tensor
    bias: Tensor

    def __init__(self, size: int, width: int, layers: Layers) -> None:
        super().__init__()
        self.device = layers.device
        self.add_parameter("weight", (size, width), layers.dtype)
        self.add_parameter("bias", (size,), layers.dtype)
        self.inputs = layers.state((width - 1, size))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return short_convolution(x, self.weight, self.bias, self.inputs, batch)


class Recurrence(Layer):
    """The gated linear recurrence of the channels; `decay` is Λ, which the checkpoint has for each channel."""

    decay: Tensor

    def __init__(self, size: int, layers: Layers) -> None:
        super().__init__()
        self.device = layers.device
        self.add_parameter("decay", (size,), torch.float32)
        self.recurrence_gate = layers.linear(size, size, bias=True)
        self.input_gate = layers.linear(size, size, bias=True)
        self.sums = layers.state((size,), torch.float32)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        strength = self.recurrence_gate(x).float().sigmoid()
        exponent = -_SHARPNESS * F.softplus(self.decay) * strength
        gated = self.input_gate(x).float().sigmoid() * x.float()
        values = (-torch.expm1(2 * exponent)).sqrt() * gated
        return linear_recurrence(exponent.exp(), values, self.sums, batch).to(x.dtype)


class RecurrentMixer(nn.Module):
    """gelu(gate(x)) · recurrence(convolution(in(x))) → out."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        size = int(config.raw.get("recurrent_size", config.hidden_size))
        self.gate_proj, self.in_proj = layers.linear(config.hidden_size, size), layers.linear(config.hidden_size, size)
        self.convolution = Convolution(size, int(config.raw.get("conv_width", 4)), layers)
        self.recurrence = Recurrence(size, layers)
        self.out_proj = layers.linear(size, config.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        mixed = self.recurrence(self.convolution(self.in_proj(x), batch), batch)
        return self.out_proj(F.gelu(self.gate_proj(x)) * mixed)


class AttentionMixer(nn.Module):
    """Rotary attention over the KV cache."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, index: int) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = layers.qkv(), layers.output(config.num_heads * config.head_dim)
        self.attend, self.split, self.rotary = layers.attention(index), layers.split_qkv, layers.rotary()

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.split(self.qkv_proj(x))
        return self.o_proj(self.attend(q, k, v, batch, rotary=self.rotary))


class Block(nn.Module):
    """One layer of either kind."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, index: int) -> None:
        super().__init__()
        self.mix_norm, self.mlp_norm = layers.norm(), layers.norm()
        pattern = config.raw.get("layer_pattern", "ra")  # r: recurrent, a: attention; repeated
        is_recurrent = pattern[index % len(pattern)] == "r"
        self.mix = RecurrentMixer(config, layers) if is_recurrent else AttentionMixer(config, layers, index)
        self.gate_up_proj, self.down_proj = layers.gate_up(), layers.output(config.intermediate_size)
        self.activation = layers.activation()

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = x + self.mix(self.mix_norm(x), batch)
        return x + self.down_proj(self.activation(self.gate_up_proj(self.mlp_norm(x))))


class AcmeHybridForCausalLM(nn.Module):
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
