"""Weights as compressed-tensors' own compressors write them. Imports that package: only for tests."""

from __future__ import annotations

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from llmd.api.v1.testing import QuantizedWeight


def extremes(weight, args):
    """The least and the largest weight of what shares a scale."""
    strategy = str(args.strategy)
    if strategy in ("group", "tensor_group"):
        groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % args.group_size)).unflatten(1, (-1, args.group_size))
        return groups.amin(2), groups.amax(2)
    if strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % wide, 0, -weight.shape[0] % high))
        blocks = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return weight.min().reshape(1), weight.max().reshape(1)


def compressed(weight, *, form, weights, inputs=None):
    """`weights` and `inputs` are QuantizationArgs by their fields; `form` is the compressor's name."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs and QuantizationArgs(**inputs))
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight}
    outer = {}
    if form == "nvfp4-pack-quantized":
        outer["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
        outer["global_scale"] = outer["weight_global_scale"]
    scale, zero = calculate_qparams(*extremes(weight, args), args, global_scale=outer.pop("global_scale", None))
    state |= {"weight_scale": scale, "weight_zero_point": zero, **outer}
    packed = {name: tensor.clone() for name, tensor in compressor.compress(state, scheme).items()}
    dense = compressor.decompress(dict(packed), scheme)["weight"].float()
    if inputs is not None and not inputs.get("dynamic"):
        packed["input_scale"] = torch.tensor([0.03])
    return QuantizedWeight(packed, dense)
