"""From tensors as checkpoints pack them to codes, and from codes to what is computed with; scales are checked on the way."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from llmd.api.v1 import Linear, ModelError, PartMethods
from llmd_kernels.grouped_linear import grouped_linear, pack, unpack
from llmd_plugins.quantization.grouped import PackedInGroups, keep, kept


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, W] → uint8 [R, count]: `count` codes of `bits` bits one after another, the first in the lowest bits."""
    words = nn.functional.pad(words, (0, -words.shape[1] % bits))
    codes = torch.empty(words.shape[0], words.shape[1] // bits * 32, dtype=torch.uint8, device=words.device)
    for index in range(32):  # 32 codes fill `bits` words
        word, shift = divmod(index * bits, 32)
        code = words[:, word::bits] >> shift
        if shift + bits > 32:
            code = (code & ((1 << (32 - shift)) - 1)) | (words[:, word + 1 :: bits] << (32 - shift))
        codes[:, index::32] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return codes[:, :count]


def taken(layer: Linear, name: str) -> Tensor:
    """A tensor that must have come, which the layer lets go of. Raises ModelError."""
    tensor = layer.take(name)
    if tensor is None:
        raise ModelError(f"the checkpoint lacks tensor {layer.checkpoint_names[0]}.{name}")
    return tensor


def taken_scale(layer: Linear, name: str, output_dim: int | None = 0) -> Tensor:
    """A scale that must have come, as float32. Raises ModelError naming the tensor unless all are finite and above 0."""
    scale = taken(layer, name)
    check_scale(layer, name, scale, output_dim)
    return scale.float()


def check_scale(layer: Linear, name: str, scale: Tensor, output_dim: int | None = 0) -> None:
    """Raise ModelError naming the part whose scales are not all finite and above 0; `output_dim` None: one for each part."""
    is_wrong = ~(torch.isfinite(scale) & (scale > 0))
    if not bool(is_wrong.any()):
        return
    where = is_wrong.nonzero()[0]
    dim = output_dim or 0
    row = int(where[dim]) if scale.dim() else 0
    part = row if output_dim is None else _part_of(layer, row * layer.out_features // scale.shape[dim])
    value = float(scale[tuple(where)])
    raise ModelError(f"tensor {layer.checkpoint_names[part]}.{name} holds {value}: a scale must be finite and above 0")


def _part_of(layer: Linear, row: int) -> int:
    """Which merged part an output is of."""
    ends = list(accumulate(part.rows.size for part in layer.parts))
    return next(index for index, end in enumerate(ends) if row < end)


def add_bias(layer: Linear) -> None:
    """Declare the bias; where the architecture has none, a checkpoint may still hold one of zeros."""
    default = None if layer.has_bias else 0.0
    layer.add_weight("bias", (layer.out_features,), layer.dtype, input_dim=None, default=default)


def finish_bias(layer: Linear) -> None:
    """Let go of a bias that the architecture has not. Raises ModelError unless it is zero."""
    if layer.has_bias:
        return
    bias = layer.take("bias")
    layer.register_parameter("bias", None)
    if bias is not None and bool(bias.any()):
        raise ModelError(f"tensor {layer.checkpoint_names[0]}.bias is not zero, but this architecture has no bias there")


class Grouped(PackedInGroups):
    """What a linear of 4- or 8-bit codes does once it is packed."""

    def create_weights(self, layer: Linear) -> None:
        raise NotImplementedError("packed weights are loaded by the method of their format")

    def finish_weights(self, layer: Linear) -> None:
        """Nothing more to do."""

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return grouped_linear(x, kept(layer), layer.bias)

    def dense_weight(self, layer: Linear) -> Tensor:
        return unpack(kept(layer))


def keep_codes(
    layer: Linear,
    codes: Tensor,
    scale: Tensor,
    zeros: Tensor | int,
    bits: int,
    group_size: int,
    groups: Tensor | None = None,
) -> None:
    """Pack W = (codes - zeros) · scale; codes [N, K] uint8, scale and zeros [N, G]; zeros may be one number for all.

    `groups`, where columns are not in the order of their groups (act-order), is each column's group, [num_parts, K].
    """
    if isinstance(zeros, Tensor):
        first = float(zeros[0, 0])
        if bool((zeros == first).all()) and first.is_integer() and 0 <= first < 1 << bits:
            zeros = int(first)  # one zero point for all needs no offsets
    if groups is None:
        _pack(layer, codes, scale, zeros, bits, group_size, None)
    elif bool((groups == groups[0]).all()):
        _pack(layer, codes, scale, zeros, bits, group_size, _order(layer, groups[0], group_size, scale.shape[1]))
    else:
        _keep_apart(layer, codes, scale, zeros, bits, group_size, groups)


def _pack(
    layer: Linear, codes: Tensor, scale: Tensor, zeros: Tensor | int, bits: int, group_size: int, order: Tensor | None
) -> None:
    offset, zero = (-zeros * scale, 0) if isinstance(zeros, Tensor) else (None, zeros)
    if order is not None:
        codes = codes[:, order]
    width = 4 if bits <= 4 else 8
    try:
        weight = pack(codes, scale, offset, bits=width, group_size=group_size, zero=zero, columns=order)
    except ValueError as error:
        raise ModelError(f"{layer.checkpoint_names[0]}: {error}") from None
    keep(layer, weight)


def _order(layer: Linear, groups: Tensor, group_size: int, num_groups: int) -> Tensor | None:
    """The columns by their groups; None when they are in order. Raises ModelError for groups of the wrong size."""
    depth = len(groups)
    order = torch.argsort(groups, stable=True)
    expected = torch.arange(depth, device=groups.device) // group_size
    if not bool((groups[order] == expected).all()) or int(expected[-1]) >= num_groups:
        name = layer.checkpoint_names[0]
        if depth != layer.columns.full:
            raise ModelError(f"{name}: groups in an order of their own (desc_act, actorder) cannot be divided among ranks")
        raise ModelError(f"{name}: its g_idx does not put {group_size} input features into each of {num_groups} groups")
    return None if bool((groups == expected).all()) else order


def _keep_apart(
    layer: Linear, codes: Tensor, scale: Tensor, zeros: Tensor | int, bits: int, group_size: int, groups: Tensor
) -> None:
    """Merged parts with an order each cannot be one matrix: from here on each is a linear of its own."""
    pieces, start = layer.part_linears(), 0
    for piece, own in zip(pieces, groups, strict=True):
        rows = slice(start, start + piece.out_features)
        piece.method, start = Grouped(), rows.stop
        bias = layer.bias
        piece.register_parameter("bias", None if bias is None else nn.Parameter(bias[rows].clone(), requires_grad=False))
        part_zeros = zeros[rows] if isinstance(zeros, Tensor) else zeros
        order = _order(piece, own, group_size, scale.shape[1])
        _pack(piece, codes[rows], scale[rows], part_zeros, bits, group_size, order)
    layer.register_parameter("bias", None)
    layer.pieces = nn.ModuleList(pieces)
    layer.method = PartMethods([Grouped() for _ in pieces])
