"""A Transformers decoder whose attention is llmd's: a step's tokens go through it as one sequence [1, T].

    Batch ─► body (embedding … last norm) ─► hidden [T, hidden_size] ─► shell (head, scaling, cap) ─► logits
                 └─ each attention: q, k, v ─► `_attend` ─► the layer's Attention over paged KV

The body is told positions, so that every token turns as its own sequence wants. No mask is made: who sees whom is in the
batch and, once, asked of the model (transformers_masks). The shell is the model's own class with a body that hands on what
it is given, so that whatever a model does to its logits is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmd.api.v1 import AttentionExtras, Layer, ModelError
from llmd_plugins.architectures.transformers_config import check_rope, read
from llmd_plugins.architectures.transformers_layers import compute_buffers, make_layers
from llmd_plugins.architectures.transformers_masks import Sight, describe, sight_of
from llmd_plugins.architectures.transformers_names import CheckpointNames

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Batch, Layers, WeightSlot

_NAME = "llmd"
_FIRST = "llmd_first"  # the same in the first pass, where the masks are looked at
_HELD = "llmd_attentions"
_KNOWN_TENSORS = {"s_aux", "position_ids", "cache_position", "input_ids", "inputs_embeds"}


class Attentions:
    """The attention of each layer, made and checked in the model's first pass, which is in the warm-up.

    Not every model hands its arguments on to attention: its modules hold this object, which holds the step's batch.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._of: dict[int, Any] = {}
        self.batch: Batch | None = None  # while the body runs

    def clear(self) -> None:
        """Forget what a first pass that failed has made."""
        self._of.clear()

    def check_all_asked(self) -> None:
        """Raises ModelError where a layer attended by other means than `_attend`, to whatever stood before it."""
        num_layers = self._layers.config.num_layers
        if len(self._of) != num_layers:
            raise ModelError(f"only {len(self._of)} of {num_layers} layers attend through Transformers' interface")

    def of(self, index: int) -> Any:
        """The Attention of a layer."""
        return self._of[index]

    def add(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, asked: Mapping[str, Any]) -> None:
        """Make that of a module which asks with these arguments. Raises ModelError for what a backend cannot be told."""
        index = module.layer_idx
        where = f"layer {index} ({type(module).__name__})"
        if index in self._of:
            raise ModelError(f"{where}: attends twice, and a paged cache has one place for its keys and values")
        self._check(where, module, q, k, v, asked)
        attend = self._layers.attention(index, scale=asked.get("scaling") or q.shape[-1] ** -0.5)
        attend.window = _window(where, asked.get("sliding_window"), sight_of(mask, where))
        cap, sinks = asked.get("softcap"), asked.get("s_aux")
        if cap is not None or sinks is not None:
            attend.extras = AttentionExtras(soft_cap=cap, sinks=None if sinks is None else sinks.detach().float())
        self._of[index] = attend

    def _check(self, where: str, module: Any, q: Tensor, k: Tensor, v: Tensor, asked: Mapping[str, Any]) -> None:
        config = self._layers.config
        shape = config.num_heads, config.num_kv_heads, config.head_dim
        if (q.shape[1], k.shape[1], k.shape[2]) != shape or v.shape != k.shape:
            heads = ", ".join(f"{name} {list(tensor.shape[1:])}" for name, tensor in (("q", q), ("k", k), ("v", v)))
            raise ModelError(f"{where}: its heads ({heads}) are not those of config.json, {shape}")
        if not 0 <= module.layer_idx < config.num_layers:
            raise ModelError(f"{where}: config.json asks for {config.num_layers} layers")
        if (cap := asked.get("softcap")) != config.soft_cap:
            raise ModelError(f"{where}: asks for soft cap {cap}, config.json for {config.soft_cap}")
        if getattr(module, "is_causal", True) is False or asked.get("is_causal") is False:
            raise ModelError(f"{where}: its tokens see those behind them, and a paged cache serves causal attention")
        if asked.get("s_aux") is not None and not config.has_sinks:
            raise ModelError(f"{where}: has attention sinks, which Transformers' code did not tell of before")
        odd = [name for name, value in asked.items() if isinstance(value, Tensor) and name not in _KNOWN_TENSORS]
        if odd:
            raise ModelError(f"{where}: attention with {', '.join(odd)} is not supported")


def _window(where: str, asked: int | None, sight: Sight | None) -> int | None:
    """The window of a layer, by its mask; many layers tell it to attention as well."""
    if sight is None or sight.window == asked or asked is None:
        return asked if sight is None else sight.window
    mask = f"one of {sight.window}" if sight.window is not None else "none"
    raise ModelError(f"{where}: asks for a window of {asked}, its mask has {mask}")


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls: query [1, H, T, D], key and value [1, K, T, D] → [1, T, H, D]. It makes no mask."""
    attentions: Attentions = getattr(module, _HELD)
    assert attentions.batch is not None
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    mixed = attentions.of(module.layer_idx)(q, k, v, attentions.batch)
    return mixed.view(1, *q.shape), None


def _attend_first(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **asked: Any
) -> tuple[Tensor, None]:
    """The same in the first pass, whose masks are `describe`d."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    getattr(module, _HELD).add(module, q, k, v, attention_mask, asked)
    return _attend(module, query, key, value)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
ALL_ATTENTION_FUNCTIONS.register(_FIRST, _attend_first)
ALL_MASK_ATTENTION_FUNCTIONS.register(_FIRST, describe)


class Given(nn.Module):
    """Stands for a body whose hidden states are known."""

    @property
    def decoder(self) -> Given:
        """What some heads call instead."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> MoeModelOutputWithPast:
        """Hands them on."""
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class TransformersDecoder(nn.Module):
    """The decoder, its parts under the names that Transformers gives them."""

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__()
        foreign = read(config.raw)
        check_rope(foreign, layers.max_model_len)
        model = _make(foreign, config, layers)
        self._names = CheckpointNames(model)
        compute_buffers(model, layers.device)
        head_name = make_layers(model, layers, config.tie_word_embeddings)
        self.ignored_weights = ("*rotary_emb.inv_freq", *self._names.ignored)
        if config.tie_word_embeddings:
            self.ignored_weights += (f"{head_name}.weight",)
        self._body_name: str = model.base_model_prefix
        for name, child in model.named_children():
            self.add_module(name, child)
        setattr(model, self._body_name, Given())
        self._shell = (model,)  # in a tuple: its head is a submodule of this module already
        self._attentions, self._is_first = Attentions(layers), True
        for module in self.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, _HELD, self._attentions)

    def forward(self, batch: Batch) -> Tensor:
        """[T, hidden_size], normalised."""
        body = getattr(self, self._body_name)
        self._attentions.batch = batch
        if self._is_first:
            self._attentions.clear()
        try:
            output = body(input_ids=batch.input_ids[None], position_ids=batch.positions[None], use_cache=False)
        finally:
            self._attentions.batch = None
        if self._is_first:
            self._attentions.check_all_asked()
            self._leave_first_pass()
        hidden: Tensor = output.last_hidden_state
        return hidden[0]

    def _leave_first_pass(self) -> None:
        for module in self.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "_attn_implementation", None) == _FIRST:
                config._attn_implementation = _NAME
        self._is_first = False

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] → [N, vocab_size] float32."""
        logits: Tensor = self._shell[0](inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0].float()

    def arrange_slots(self, slots: Mapping[str, WeightSlot], names: Iterable[str]) -> dict[str, tuple[str, WeightSlot]]:
        """For each tensor of a checkpoint the slot that it fills, and how."""
        return self._names.arrange(slots, names, self._materialize)

    def _materialize(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        layer = self.get_submodule(path)
        assert isinstance(layer, Layer)
        return layer.materialize(last)


def _make(foreign: Any, config: ArchitectureConfig, layers: Layers) -> Any:
    """Build the model without memory. Raises ModelError for what this way cannot serve."""
    try:
        model = AutoModelForCausalLM.from_config(foreign, dtype=layers.dtype, attn_implementation=_FIRST)
    except Exception as error:  # any model's code may raise anything about a config
        raise ModelError(f"Transformers cannot build {' / '.join(config.architectures)}: {error}") from error
    kind = type(model).__name__
    if kind not in config.architectures:
        raise ModelError(f"Transformers builds {kind} for this model_type, config.json asks for {config.architectures[0]}")
    if layers.shard.world > 1:
        raise ModelError(f"{kind} runs through Transformers' code, which is not divided among ranks: use one device")
    if model._is_stateful or not model._supports_attention_backend:
        raise ModelError(f"{kind} does not attend over keys and values that llmd can keep")
    return model
