"""AWQ (Lin et al., AWQ: Activation-aware Weight Quantization): before rounding, input features that carry much are scaled
up in the weight and down where they come from, by as much of their mean as leaves the smallest error in the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmd_plugins.commands.quantize.rounding import round_to_nearest

_STEPS = 20


class Pair(NamedTuple):
    """Linears that share an input, and the module whose output that is: a norm's weight, or a linear's rows."""

    before: Any
    linears: tuple[str, ...]


def pairs_of(layer: Any) -> list[Pair]:
    """What can be scaled in a layer of Llama's kind."""
    attention, mlp = layer.self_attn, layer.mlp
    found = [
        Pair(layer.input_layernorm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Pair(layer.post_attention_layernorm, ("mlp.gate_proj", "mlp.up_proj")),
        Pair(mlp.up_proj, ("mlp.down_proj",)),
    ]
    if attention.v_proj.out_features == attention.o_proj.in_features:  # with grouped heads each value goes to several
        found.insert(1, Pair(attention.v_proj, ("self_attn.o_proj",)))
    return found


def best_scale(weights: Sequence[Tensor], hessian: Tensor, mean: Tensor, *, group_size: int, bits: int) -> Tensor:
    """[K], what to multiply the columns by; `mean` is that of the inputs' sizes, `hessian` the sum of their products."""
    best, least = torch.ones_like(mean), torch.inf
    for step in range(_STEPS):
        scale = mean.clamp_min(1e-4) ** (step / _STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(_error(weight, scale, hessian, group_size, bits) for weight in weights)
        if error < least:
            best, least = scale, error
    return best


def _error(weight: Tensor, scale: Tensor, hessian: Tensor, group_size: int, bits: int) -> float:
    """Of the output, squared and summed over all inputs."""
    codes, grid = round_to_nearest(weight * scale, group_size, bits, symmetric=False)
    groups = torch.arange(weight.shape[1], device=weight.device) // group_size
    change = grid.values(codes, groups) / scale - weight
    return float(((change @ hessian) * change).sum())


def fold(pair: Pair, layer: Any, scale: Tensor) -> None:
    """Scale the columns up, and the output that they read down."""
    for name in pair.linears:
        layer.get_submodule(name).weight.data.mul_(scale)
    weight = pair.before.weight.data
    if isinstance(pair.before, nn.Linear):
        weight.div_(scale.unsqueeze(1))
        if pair.before.bias is not None:
            pair.before.bias.data.div_(scale)
    else:
        weight.div_(scale)
