"""Foreign modules as layers: plain linears become llmd's, so that quantization and adapters work; others keep their code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmd.api.v1 import Embedding, Layer, Layers, Linear, LMHead, ModelError, WeightSlot
from llmd_kernels.linear import linear


class FlatLinear(Linear):
    """A Linear that takes any number of leading dims."""

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[..., in_features] → [..., out_features], or the activation of that."""
        return super().forward(x.flatten(0, -2), activation).unflatten(0, x.shape[:-1])


class FlatEmbedding(Embedding):
    """An Embedding that takes any number of leading dims."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] → [..., hidden_size]."""
        return super().forward(input_ids.flatten()).unflatten(0, input_ids.shape)


class FlatHead(LMHead):
    """An LMHead that takes any number of leading dims."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] → [..., vocab_size] float32."""
        return super().forward(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])


class TiedHead(nn.Module):
    """Logits from the table of an embedding that is not llmd's own."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: not a submodule, its weight is loaded once

    @property
    def weight(self) -> Any:
        """[vocab_size, hidden_size]."""
        return self._embedding[0].weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] → [..., vocab_size] float32."""
        return linear(hidden.flatten(0, -2), self.weight, out_dtype=torch.float32).unflatten(0, hidden.shape[:-1])


class Foreign(Layer):
    """What a module of Transformers becomes by `adopt`: its own code over tensors that the loader fills."""

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Its parameters, and the buffers that checkpoints hold."""
        yield from super().weight_slots()
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in self._non_persistent_buffers_set:
                yield WeightSlot(f"{self.name}.{name}", tuple(buffer.shape), self._buffer_loader(name), buffer.dtype)

    def _buffer_loader(self, name: str) -> Callable[[Tensor], None]:
        def load(tensor: Tensor) -> None:
            kept = self._buffers[name]
            assert kept is not None
            self._buffers[name] = tensor.to(self.device, kept.dtype, copy=True)

        return load


def _adopt(module: nn.Module, device: torch.device) -> None:
    """Make a module a Layer in place: its class gets Foreign before its own."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (Foreign, kind), {"device": device, "__module__": kind.__module__})


def compute_buffers(model: Any, device: torch.device) -> None:
    """Give memory to buffers that no checkpoint holds (rope's frequencies), filled by the model's own initialization."""
    for module in model.modules():
        if loose := [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]:
            raise ModelError(f"{type(module).__name__}.{loose[0]} cannot be computed: it is no buffer")
        mine = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if not mine:
            continue
        for name in mine:
            module._buffers[name] = _marked(module._buffers[name], device)
        with torch.device(device):
            model._init_weights(module)
        for name in mine:
            if _is_marked(module._buffers[name]):
                raise ModelError(f"{type(module).__name__}.{name} cannot be computed: Transformers says nowhere how")


def _marked(like: Tensor, device: torch.device) -> Tensor:
    """As large, and nowhere what an initialization would write."""
    mark = float("nan") if like.is_floating_point() else -1
    return torch.full(like.shape, mark, dtype=like.dtype, device=device)


def _is_marked(buffer: Tensor) -> bool:
    if buffer.is_meta:  # it is only weighed
        return False
    if buffer.dtype == torch.bool or not buffer.numel():
        return bool(buffer.numel())
    return bool((buffer.isnan() if buffer.is_floating_point() else buffer == -1).any())


def make_layers(model: Any, layers: Layers, is_tied: bool) -> str:
    """Replace what llmd has a layer for, adopt everything else that holds weights; gives the head's name."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language head")
    names = {module: name for name, module in model.named_modules()}
    table_name, head_name = names[table], names[head]
    _put(model, table_name, _embedding(table, layers))
    _put(model, head_name, _head(model.get_submodule(table_name), head, layers, is_tied))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != head_name and module.weight.dtype == layers.dtype:
            own = layers.linear(module.in_features, module.out_features, bias=module.bias is not None)
            own.__class__ = FlatLinear
            _put(model, name, own)
        elif not isinstance(module, Layer) and (module._parameters or module._buffers):
            _adopt(module, layers.device)
    return head_name


def _embedding(module: Any, layers: Layers) -> nn.Module:
    """llmd's where it is a plain table of the model's own size."""
    shape = layers.config.vocab_size, layers.config.hidden_size
    if type(module) is not nn.Embedding or tuple(module.weight.shape) != shape or module.max_norm is not None:
        return module
    embedding = layers.embedding()
    embedding.__class__ = FlatEmbedding
    return embedding


def _head(table: nn.Module, head: Any, layers: Layers, is_tied: bool) -> nn.Module:
    """llmd's where it is a plain matrix of the model's own size, or the table's where they are one."""
    shape = layers.config.vocab_size, layers.config.hidden_size
    is_plain = type(head) is nn.Linear and getattr(head, "bias", None) is None and tuple(head.weight.shape) == shape
    if is_tied and not isinstance(table, Embedding):
        if not is_plain:
            raise ModelError(f"{type(head).__name__}: this head cannot share its weight with {type(table).__name__}")
        return TiedHead(table)
    if not is_plain:
        if is_tied:
            raise ModelError(f"{type(head).__name__}: this head cannot share its weight with the embedding")
        return head
    lm_head = layers.lm_head(table)  # type: ignore[arg-type]  # untied, it does not look at the table
    lm_head.__class__ = FlatHead
    return lm_head


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
