"""Weights of 8-bit floats (e4m3) with a scale for all, for each output, or for each block of outputs and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmd.api.v1 import Linear, ModelError, QuantMethod
from llmd_kernels.experts import Fp8Weight
from llmd_kernels.fp8_linear import Activations, dequantize, fp8_linear
from llmd_plugins.quantization.fp8 import Fp8Config, is_fp8
from llmd_plugins.quantization.settings import by_parts
from llmd_plugins.quantization.stored import add_bias, check_scale, finish_bias, taken, taken_scale


class Fp8:
    """Every linear but those that the skip lists name."""

    ignored_weights = ("*.k_scale", "*.v_scale", "*.q_scale", "*.kv_scale")  # of a quantized KV cache

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._config = Fp8Config(settings) if is_fp8(settings) else None

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return is_fp8(settings)

    def method(self, layer: Linear) -> QuantMethod | None:
        assert self._config is not None
        layout = Fp8Layout(self._config.scale_names, self._config.input_scale_names, self._config.block, self._config.by_row)
        return fp8_method(layer, self._config.is_quantized, layout)

    def head_method(self, layer: Linear) -> QuantMethod | None:
        assert self._config is not None
        return self.method(layer) if self._config.has_head else None


@dataclass(frozen=True, slots=True)
class Fp8Layout:
    """What the tensors are called, and which weights share a scale."""

    scale_names: tuple[str, ...]  # the one that the checkpoint has
    input_scale_names: tuple[str, ...] = ()  # which it may have
    block: tuple[int, int] | None = None  # outputs and inputs that share a scale
    by_row: bool = False  # a scale for each output; else, without blocks, one for each part
    quantizes_inputs: bool = True  # where the device multiplies 8-bit floats


def fp8_method(layer: Linear, is_quantized: Any, layout: Fp8Layout) -> QuantMethod | None:
    """One method for the merged parts, unless a block of scales would reach over two of them."""
    apart = layout.block is not None and any(part.rows.size % layout.block[0] for part in layer.parts)
    return by_parts(layer, is_quantized, lambda _: Fp8Linear(layout), apart=apart)


class Fp8Linear:
    """weight float8_e4m3fn [N, K] and its scales; on a GPU inputs become e4m3 too, by measured scales or by token."""

    def __init__(self, layout: Fp8Layout) -> None:
        self._layout = layout

    def create_weights(self, layer: Linear) -> None:
        rows, columns = layer.out_features, layer.in_features
        layer.add_weight("weight", (rows, columns), torch.float8_e4m3fn)
        default = None if len(self._layout.scale_names) == 1 else 1.0
        for name in self._layout.scale_names:
            if self._layout.block is not None:
                high, wide = self._layout.block
                shape = (layer.num_blocks(high), -(-columns // wide))
                layer.add_weight(name, shape, torch.float32, output_block=high, input_block=wide, default=default)
            elif self._layout.by_row:
                layer.add_weight(name, (rows, 1), torch.float32, input_dim=None, default=default)
            else:
                layer.add_part_weight(name, (1,), torch.float32, default=default)
        for name in self._layout.input_scale_names:
            layer.add_part_weight(name, (1,), torch.float32, default=1.0)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        layer.register_buffer("input_scale", self._input_scale(layer))
        finish_bias(layer)
        scale = self._scale(layer)
        layer.weight = nn.Parameter(taken(layer, "weight"), requires_grad=False)
        layer.register_buffer("weight_scale", scale)

    def _input_scale(self, layer: Linear) -> Tensor | None:
        """The largest that was measured for a part: all parts have the same inputs."""
        found = None
        for name in self._layout.input_scale_names:
            scale = layer.take(name)
            if scale is not None:
                check_scale(layer, name, scale, None)
                found = scale.amax()
        return found

    def _scale(self, layer: Linear) -> Tensor:
        """[ceil(N / rows), ceil(K / columns)] of blocks, or [N, 1], or [N]."""
        names = [name for name in self._layout.scale_names if not layer._parameters[name].is_meta]  # type: ignore[union-attr]
        if len(names) != 1:
            wanted = " or ".join(f"{layer.checkpoint_names[0]}.{name}" for name in self._layout.scale_names)
            raise ModelError(f"the checkpoint {'holds both' if names else 'lacks'} tensor {wanted}")
        for name in set(self._layout.scale_names) - set(names):
            layer.take(name)
        if self._layout.block is not None or self._layout.by_row:
            return taken_scale(layer, names[0]).contiguous()
        rows = torch.tensor([part.rows.size for part in layer.parts], device=layer.device)
        return taken_scale(layer, names[0], None).flatten().repeat_interleave(rows)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        weight, scale, block, kind, x_scale = self.expert_weight(layer)
        return fp8_linear(x, weight, scale, layer.bias, block=block, activations=kind, x_scale=x_scale)

    def expert_weight(self, layer: Linear) -> Fp8Weight:
        buffers, block = layer._buffers, self._layout.block
        scale, x_scale = buffers["weight_scale"], None
        kind: Activations = "float"
        assert scale is not None
        if layer.weight.is_cuda and self._layout.quantizes_inputs:
            x_scale = buffers["input_scale"]
            kind = "tensor" if x_scale is not None else "group" if block is not None else "token"
        return Fp8Weight(layer.weight, scale, block, kind, x_scale)

    def dense_weight(self, layer: Linear) -> Tensor:
        scale = layer._buffers["weight_scale"]
        assert scale is not None
        return dequantize(layer.weight, scale, self._layout.block)
