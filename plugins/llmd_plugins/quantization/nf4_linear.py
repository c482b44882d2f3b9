"""Blocks of 64 input features, the largest of each at ±1, the others at the nearest of 16 quantiles.

The quantiles are those of bitsandbytes (Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, appendix E).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmd.api.v1 import Linear, add_dense_weights
from llmd_kernels.codebook_linear import CodebookWeight, codebook_linear, pack, unpack
from llmd_kernels.quantize_weight.reference import by_group, parts
from llmd_plugins.quantization.online import Online, buffer_of, check_scale

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
GROUP_SIZE = 64
_SMALLEST_SCALE = 2.0**-24  # of float16


class Nf4(Online):
    """Quantizes every linear, and to 8 bits the table of tokens."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(Nf4Linear, options or {})


class CodebookLinear:
    """What a linear with a codebook does once its weight is packed."""

    def keep(self, layer: Linear, weight: CodebookWeight) -> None:
        for name in ("packed", "scale", "codebook"):
            layer.register_buffer(f"coded_{name}", getattr(weight, name))
        layer.coded = weight  # type: ignore[assignment]

    def packed_facts(self, layer: Linear) -> dict[str, Any]:
        weight: CodebookWeight = layer.coded  # type: ignore[assignment]
        return {"group_size": weight.group_size, "in_features": weight.in_features}

    def restore_weights(self, layer: Linear, facts: Mapping[str, Any]) -> None:
        tensors = {name: buffer_of(layer, f"coded_{name}") for name in ("packed", "scale", "codebook")}
        layer.coded = CodebookWeight(**tensors, **facts)  # type: ignore[assignment, arg-type]

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return codebook_linear(x, layer.coded, layer.bias)  # type: ignore[arg-type]

    def dense_weight(self, layer: Linear) -> Tensor:
        return unpack(layer.coded)  # type: ignore[arg-type]


class Nf4Linear(CodebookLinear):
    """The dense weight as it loads, then 4-bit codes with a float16 scale for each block."""

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        codes, scale = quantize_nf4(layer.weight.data)
        check_scale(layer, scale)
        layer.weight = None  # type: ignore[assignment]  # the original is freed before the packed one is made
        codebook = torch.tensor(NF4, device=codes.device)
        self.keep(layer, pack(codes, scale, codebook, group_size=GROUP_SIZE))


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] → uint8 codes [N, K] and float16 scales [N, ceil(K / 64)]."""
    num_groups = -(-weight.shape[1] // GROUP_SIZE)
    values = torch.tensor(NF4, device=weight.device)
    borders = (values[1:] + values[:-1]) / 2
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(weight.shape[0], num_groups, dtype=torch.float16, device=weight.device)
    for part in parts(weight):
        columns = by_group(weight[part], GROUP_SIZE)
        stored = columns.abs().amax(0).to(torch.float16)
        scale[part] = stored.view(-1, num_groups)
        normed = columns.div_(stored.float().clamp_min_(_SMALLEST_SCALE))
        rounded = torch.bucketize(normed, borders, out_int32=True).to(torch.uint8)
        codes[part] = rounded.T.reshape(-1, num_groups * GROUP_SIZE)[:, : weight.shape[1]]
    return codes, scale
