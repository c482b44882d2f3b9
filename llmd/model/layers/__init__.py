"""The layers that architectures are made of. `Layers` is handed to them, so that they never mention quantization, ranks,
dtypes or devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from llmd.errors import ModelError
from llmd.model.config import ArchitectureConfig, RopeConfig
from llmd.model.layers.activation import gated_activation, plain_activation
from llmd.model.layers.attention import Attention, EncoderAttention
from llmd.model.layers.embedding import Embedding, LMHead
from llmd.model.layers.experts import ACTIVATIONS, Expert, Experts
from llmd.model.layers.linear import Linear, Part
from llmd.model.layers.norm import LayerNorm, RMSNorm
from llmd.model.layers.parameters import Layer, Shard, Slice, WeightSlot
from llmd.model.layers.rotary import Rotary
from llmd.model.states import RowState, StateShape, check_shape

if TYPE_CHECKING:
    from llmd.model.attention import AttentionBackend, AttentionExtras

__all__ = [
    "Attention", "Embedding", "EncoderAttention", "Expert", "Experts", "LMHead", "Layer", "LayerNorm", "Layers",
    "Linear", "Part", "RMSNorm", "Rotary", "Shard", "Slice", "WeightSlot",
]  # fmt: skip


class Layers:
    """Makes layers for one model on one device. Parameters are declared, not allocated: the loader gives them memory."""

    def __init__(
        self,
        config: ArchitectureConfig,
        backend: AttentionBackend,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        shard: Shard | None = None,
    ) -> None:
        self.config = config
        self.backend = backend
        self.dtype = dtype
        self.device = device
        self.max_model_len = max_model_len
        self.shard = shard or Shard()
        self.num_heads = self.shard.part(config.num_heads, "num_attention_heads")  # of this rank
        self.num_kv_heads = max(1, config.num_kv_heads // self.shard.world)  # of this rank
        self.states: list[StateShape] = []  # that the layers asked for, in their order
        self.kv_layers: dict[int, int] = {}  # of layers with attention: which of the KV pool's layers is theirs
        self._rotaries: dict[tuple[RopeConfig, int], Rotary] = {}

    def embedding(self, num_entries: int | None = None) -> Embedding:
        """The token table, or one of `num_entries` for positions or token types."""
        holds_tokens = num_entries is None
        num_entries = num_entries or self.config.vocab_size
        size = self.config.hidden_size
        return Embedding(num_entries, size, dtype=self.dtype, device=self.device, holds_tokens=holds_tokens)

    def lm_head(self, embedding: Embedding) -> LMHead:
        """Logits, from the embedding's own table where the checkpoint ties them."""
        tied = embedding if self.config.tie_word_embeddings else None
        return LMHead(self.config.vocab_size, self.config.hidden_size, tied, dtype=self.dtype, device=self.device)

    def norm(self, size: int | None = None) -> RMSNorm:
        """RMSNorm over the hidden size, or over `size`."""
        return RMSNorm(size or self.config.hidden_size, self.config.rms_norm_eps, dtype=self.dtype, device=self.device)

    def layer_norm(self, eps: float, *, bias: bool = True) -> LayerNorm:
        """LayerNorm over the hidden size."""
        return LayerNorm(self.config.hidden_size, eps, bias=bias, dtype=self.dtype, device=self.device)

    def linear(self, in_features: int, out_features: int, *, bias: bool = False) -> Linear:
        """A linear that every rank holds whole."""
        return self._linear([Part("", Slice.of(out_features, None, ""))], Slice.of(in_features, None, ""), bias)

    def qkv(self, *, bias: bool = False, names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")) -> Linear:
        """The three projections of the checkpoint, as it names them, in one; its output is cut by `split_qkv`."""
        config, shard = self.config, self.shard
        q = Slice.of(config.num_heads * config.head_dim, shard, "num_attention_heads * head_dim")
        kv = self._kv_rows()
        parts = [Part(names[0], q), Part(names[1], kv), Part(names[2], kv)]
        return self._linear(parts, Slice.of(config.hidden_size, None, ""), bias)

    def split_qkv(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, (H + 2K)·D] → views q [T, H, D], k and v [T, K, D]."""
        heads = qkv.view(qkv.shape[0], -1, self.config.head_dim)
        return heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)

    def gate_up(
        self, *, bias: bool = False, size: int | None = None, names: tuple[str, str] = ("gate_proj", "up_proj")
    ) -> Linear:
        """gate_proj and up_proj in one, as the checkpoint names them; its output goes to `activation`.

        `size`: the features of each, by default intermediate_size.
        """
        rows = Slice.of(size or self.config.intermediate_size, self.shard, "intermediate_size")
        return self._linear([Part(name, rows) for name in names], Slice.of(self.config.hidden_size, None, ""), bias)

    def experts(
        self, count: int, size: int, *, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ) -> Experts:
        """`count` gated MLPs of `size` features, their linears `<number>.<name>`; called with what a router chose."""
        activation = self.activation()
        made = (
            Expert(self.gate_up(size=size, names=names[:2]), self.output(size), names[2], activation) for _ in range(count)
        )
        return Experts(made, ACTIVATIONS[self.config.hidden_act])

    def router(self, num_experts: int) -> Linear:
        """Scores for experts, [T, num_experts]: never quantized while loading, for a token's way hangs on small gaps."""
        linear = self.linear(self.config.hidden_size, num_experts)
        linear.keeps_precision = True
        return linear

    def activation(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """act(gate) · up."""
        return gated_activation(self.config.hidden_act)

    def plain_activation(
        self, name: str | None = None, *, key: str = "hidden_act"
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """act alone: config.hidden_act, or `name` as config.json has it under `key`."""
        return plain_activation(name or self.config.hidden_act, key)

    def output(self, in_features: int, *, bias: bool = False) -> Linear:
        """Back to the hidden size from features that are split among the ranks."""
        return self._linear(
            [Part("", Slice.of(self.config.hidden_size, None, ""))],
            Slice.of(in_features, self.shard, "in_features"),
            bias,
            reduce=self.shard if self.shard.world > 1 else None,
        )

    def rotary(self, rope: RopeConfig | None = None) -> Rotary:
        """The model's rotary embedding, or another where layers differ; each table is made once."""
        key = (rope or self.config.rope, self.config.head_dim)
        if key not in self._rotaries:
            self._rotaries[key] = Rotary(*key, self.max_model_len, self.device)
        return self._rotaries[key]

    def attention(self, index: int, *, scale: float | None = None, extras: AttentionExtras | None = None) -> Attention:
        """Attention of layer `index`; `extras`: a soft cap, sinks or slopes."""
        window = self.config.windows[index] if self.config.windows else None
        place = self.kv_layers.setdefault(index, len(self.kv_layers))
        return Attention(self.backend, place, scale or self.config.head_dim**-0.5, window, extras)

    def state(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> RowState:
        """A tensor that every row keeps from step to step, in the model's dtype or `dtype` (float32 for what is summed up).

        The architecture's spec must say `has_state=True`. Raises ModelError for a shape that cannot be kept.
        """
        kept = check_shape(shape, dtype or self.dtype)
        self.states.append(kept)
        return RowState(len(self.states) - 1, kept.shape, kept.dtype)

    def encoder_attention(self, *, window: int | None = None) -> EncoderAttention:
        """Attention among all tokens of a sequence, or those at most `window` away."""
        return EncoderAttention(self.backend, self.config.head_dim**-0.5, window)  # type: ignore[arg-type]

    def _kv_rows(self) -> Slice:
        """Key or value rows of this rank; with more ranks than heads, several ranks hold the same head."""
        config, shard = self.config, self.shard
        full = config.num_kv_heads * config.head_dim
        if config.num_kv_heads >= shard.world:
            return Slice.of(full, shard, "num_key_value_heads * head_dim")
        if shard.world % config.num_kv_heads:
            raise ModelError(
                f"{shard.world} ranks cannot share num_key_value_heads ({config.num_kv_heads}): one must divide the other"
            )
        head = shard.rank * config.num_kv_heads // shard.world
        return Slice(full, head * config.head_dim, config.head_dim)

    def _linear(self, parts: list[Part], columns: Slice, bias: bool, reduce: Shard | None = None) -> Linear:
        return Linear(parts, columns, bias=bias, dtype=self.dtype, device=self.device, reduce=reduce)
