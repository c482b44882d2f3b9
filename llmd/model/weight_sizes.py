"""What the weights of a model without memory will take, and what of them a step reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llmd.config import AdaptersConfig
from llmd.errors import ModelError
from llmd.model.config import ArchitectureConfig
from llmd.model.layers import Embedding, Layer, Linear, LMHead
from llmd.model.layers.experts import Experts
from llmd.model.weights import held_bytes

log = logging.getLogger("llmd.model")


def step_bytes(module: nn.Module) -> int:
    """Weights that a decode step of many rows reads."""
    return held_bytes(module) - _idle_bytes(module)


def token_bytes(module: nn.Module, config: ArchitectureConfig) -> int:
    """Weights that a decode step of one row reads: of a mixture only the experts that it chooses."""
    chosen = config.raw.get("num_experts_per_tok")
    idle = 0
    if isinstance(chosen, int):
        mixtures = [child for child in module.modules() if isinstance(child, Experts) and len(child) > chosen]
        idle = sum(held_bytes(experts) * (len(experts) - chosen) // len(experts) for experts in mixtures)
    return step_bytes(module) - idle


def weight_bits(module: nn.Module) -> float:
    """Mean bits of a weight of the linears, scales included; 16 where there are none."""
    linears = [child for child in module.modules() if isinstance(child, Linear)]
    count = sum(layer.in_features * layer.out_features for layer in linears)
    return 8 * sum(held_bytes(layer) for layer in linears) / count if count else 16.0


def weights_bytes(module: nn.Module) -> int:
    """As they are kept: every layer is finished without memory; where that cannot be, as the checkpoint has them."""
    before = held_bytes(module)
    done: dict[object, Linear] = {}
    try:
        with torch.inference_mode(), _ChecksPass():
            for layer in module.modules():
                if isinstance(layer, Layer):
                    _finish(layer, done)
    except (RuntimeError, NotImplementedError, ModelError) as error:  # it looks at values, which are not there
        log.debug("the weights are reckoned as the checkpoint has them", exc_info=error)
        return before
    return held_bytes(module)


def _finish(layer: Layer, done: dict[object, Linear]) -> None:
    """A model has many equal linears: one of each kind is finished, the others become like it."""
    if not isinstance(layer, Linear) or getattr(layer, "finished", None) is not None:
        layer.finish_weights()
        return
    kind = (type(layer.method), layer.in_features, layer.out_features, len(layer.parts), tuple(_shapes(layer)))
    if (like := done.get(kind)) is None:
        layer.finish_weights()
        done[kind] = layer
        return
    layer._parameters = {name: None if own is None else nn.Parameter(torch.empty_like(own), requires_grad=False)
                         for name, own in like._parameters.items()}  # fmt: skip
    layer._buffers = {name: None if own is None else torch.empty_like(own) for name, own in like._buffers.items()}


def _shapes(layer: Linear) -> Iterator[tuple[object, ...]]:
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        yield name, None if tensor is None else (tuple(tensor.shape), tensor.dtype)


class _ChecksPass(TorchFunctionMode):
    """Questions about all values of a tensor without memory are answered as for good weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answers = {"all": True, "any": False, "max": 1.0}
        if getattr(func, "__name__", "") in answers and len(args) == 1 and args[0].is_meta and not kwargs:
            return torch.tensor(answers[func.__name__])
        return func(*args, **(kwargs or {}))


def _idle_bytes(module: nn.Module) -> int:
    """The embedding's table, of which a step reads a few rows, unless the head reads all of it."""
    is_tied = any(isinstance(child, LMHead) and child.is_tied for child in module.modules())
    return 0 if is_tied else sum(held_bytes(child) for child in module.modules() if isinstance(child, Embedding))


def adapter_bytes(module: nn.Module, wanted: AdaptersConfig | None, dtype: torch.dtype) -> int:
    """Slots beside every linear: A [slots, rank · parts, in] and B [slots, out, rank]."""
    if wanted is None or not wanted.enable_lora:
        return 0
    sizes = (
        layer.in_features * len(layer.parts) + layer.out_features for layer in module.modules() if isinstance(layer, Linear)
    )
    return wanted.max_loras * wanted.max_lora_rank * sum(sizes) * dtype.itemsize
