"""Prints the relative error of the experts' Triton kernels in the interpreter, by case."""

import json
from unittest import mock

import torch

from llmd_kernels.experts import _ACTIVATIONS as ACTIVATIONS
from llmd_kernels.experts import ExpertWeights, Fp8Weight, Stack, reference, triton_sorting
from llmd_kernels.experts import triton as gpu
from llmd_kernels.experts.table import Tile
from llmd_kernels.experts.triton_sorting import route, sort_pairs
from llmd_kernels.fp8_linear import quantize_weight as to_fp8
from llmd_kernels.grouped_linear import GroupedWeight
from llmd_kernels.grouped_linear.triton import pack
from llmd_kernels.int8_linear import Int8Weight
from llmd_kernels.quantize_weight.reference import quantize_channels

errors = {}
FEW, MANY = Tile(16, 32, 64, 1, True, 4, 3), Tile(32, 64, 32, 2, False, 4, 3)


def compare(name, actual, expected):
    errors[name] = float((actual.double() - expected.double()).norm() / expected.double().norm())


def chosen(tokens, k, count, skew=0.0):
    logits = torch.randn(tokens, count) - skew * torch.arange(count)
    ids, weights = reference.route(logits, k, normalized=True)
    return ids.contiguous(), weights


def check_order(ids, count, tile):
    """Places hold every pair once, blocks cover them, and no block is of two experts."""
    found = sort_pairs(ids, count, tile)
    flat = ids.flatten()
    assert torch.equal(found.order.long(), flat.argsort(stable=True))
    covered = []
    for expert, start, end in found.table.T.tolist():
        assert end - start <= tile.block_m
        if start < end:
            assert flat[found.order[start:end].long()].eq(expert).all()
            covered += range(start, end)
    assert covered == list(range(len(flat)))


def check_routes():
    for tokens, k, count, dtype in (
        (3, 2, 5, torch.float32), (2, 8, 128, torch.float16), (1, 1, 1, torch.float32), (2, 3, 8, torch.float32),
    ):  # fmt: skip
        logits = torch.randn(tokens, 2 * count).to(dtype)[:, :count]
        if count == 8:  # ties, and experts that nothing speaks for
            logits = logits.round()
            logits[1] = -float("inf")
            logits[1, 4] = 0.0
        for normalized in (False, True):
            ids, weights = route(logits, k, normalized=normalized)
            expected = reference.route(logits, k, normalized=normalized)
            assert torch.equal(ids, expected[0]), (ids, expected[0])
            compare(f"route {tokens} {k} {count} {normalized}", weights, expected[1])
    ids, weights = route(torch.full((1, 6), float("nan")), 2, normalized=True)
    assert weights.isnan().all()
    assert ids.max() < 6


# --- weights


def dense(width, depth, dtype):
    return (torch.randn(width, depth) / depth**0.5).to(dtype)


def in_groups(bits, group_size, *, has_offset=False, has_columns=False):
    def make(width, depth, dtype):
        count = -(-depth // group_size)
        q = torch.randint(0, 1 << bits, (width, depth), dtype=torch.uint8)
        scale, offset = torch.rand(2, count, width).add(0.5).div((1 << bits) * depth**0.5).half()
        order = torch.randperm(depth).int() if has_columns else None
        factor = 2.0 ** int(torch.randint(-1, 2, ()))
        offset = (offset * -(1 << (bits - 1))).half() if has_offset else None
        size, zero = min(group_size, depth), 0 if has_offset else 1 << (bits - 1)
        return GroupedWeight(pack(q, bits), scale, offset, order, bits, size, zero, depth, width, factor, "chunks")

    return make


def eight_bits(width, depth, dtype):
    quantized, scale, sums = quantize_channels(torch.randn(width, depth) / depth**0.5)
    return Int8Weight(quantized, scale, sums, depth)


def floats(block, activations="float", *, is_one=False):
    def make(width, depth, dtype):
        stored, scale = to_fp8(torch.randn(width, depth) / depth**0.5, block or ((width, depth) if is_one else None))
        x_scale = torch.tensor([0.02]) if activations == "tensor" else None
        return Fp8Weight(stored, scale.flatten() if is_one else scale, block, activations, x_scale)

    return make


def stacked(count, make, *sizes):
    stack, each = Stack(count), [make(*sizes) for _ in range(count)]
    before = [weight.clone() for weight in each] if make is dense else []
    for number, weight in enumerate(each):
        stack.take(number, weight)
    for weight, expected in zip(each, before, strict=False):
        assert torch.equal(weight, expected)
    assert gpu._why_not(stack.weight) is None
    return ExpertWeights(each, stack.weight)


def run(name, make, shape, dtype, tile, kind="silu"):
    """tokens, k, experts, hidden size, size of an expert"""
    tokens, k, count, hidden, size = shape
    gpu.tile_for = lambda *_: tile
    gate_up, down = stacked(count, make, 2 * size, hidden, dtype), stacked(count, make, hidden, size, dtype)
    ids, weights = chosen(tokens, k, count, 0.5)
    x = torch.randn(tokens, 2 * hidden).to(dtype)[:, :hidden]
    expected = reference.experts(x, ids, weights, gate_up, down, ACTIVATIONS[kind])
    compare(f"{name} {shape} {dtype} {tile.is_few}", gpu.experts(x, ids, weights, gate_up, down, kind), expected)


torch.manual_seed(0)
for tokens, k, count, skew in (
    (1, 1, 3, 0),
    (1, 8, 128, 0),
    (16, 8, 128, 0),
    (7, 2, 8, 5),
    (1100, 2, 5, 0.3),
    (700, 3, 60, 0),
):
    check_order(chosen(tokens, k, count, skew)[0], count, FEW)
check_order(chosen(600, 2, 8, 0.5)[0], 8, MANY._replace(block_m=128))
with mock.patch.multiple(triton_sorting, CHUNK=32, sorted_at_once=lambda _: 16):  # more chunks than are looked at at once
    check_order(chosen(300, 2, 20, 0.1)[0], 20, FEW)
check_routes()
y, x, gate = torch.randn(3, 1100), torch.randn(3, 1100), torch.randn(3, 1)
compare("add gated", gpu.add_gated(y, x, gate), reference.add_gated(y, x, gate))
gpu.shaped = lambda tile, *_: tile
for tile in (FEW, MANY):
    for shape in ((1, 2, 4, 64, 40), (5, 3, 6, 72, 24), (20, 1, 2, 33, 17)):
        run("dense", dense, shape, torch.float32, tile)
    run("dense", dense, (40, 2, 3, 64, 64), torch.float16, tile)
for kind in ACTIVATIONS:
    run(kind, dense, (5, 3, 6, 72, 24), torch.float32, FEW, kind)
for name, make, shape in (
    ("int4", in_groups(4, 32), (5, 2, 3, 128, 96)),
    ("int4 by 64 with offsets", in_groups(4, 64, has_offset=True), (3, 2, 2, 256, 128)),
    ("int4 by 128 in an order", in_groups(4, 128, has_columns=True), (3, 1, 3, 128, 160)),
    ("int4 by rows", in_groups(4, 1000), (2, 2, 3, 72, 40)),
    ("int4 by 96", in_groups(4, 96), (3, 2, 3, 192, 96)),
    ("int8 by 32 with offsets", in_groups(8, 32, has_offset=True), (3, 2, 3, 128, 48)),
):
    run(name, make, shape, torch.float32, FEW)
    if "offsets" in name:
        run(f"{name}, many", make, shape, torch.float32, FEW._replace(block_m=128))
    if name in ("int4", "int8 by 32 with offsets"):
        run(name, make, shape, torch.float16, FEW)
for tile in (FEW, MANY):
    run("int8", eight_bits, (5, 2, 4, 72, 40), torch.float32, tile)
    tile = tile._replace(block_k=128)
    run("fp8 by rows", floats(None), (3, 2, 3, 72, 40), torch.float16, tile)
    run("fp8 as a whole", floats(None, is_one=True), (3, 2, 3, 72, 40), torch.float32, tile)
    run("fp8 by blocks", floats((128, 128), "group"), (3, 2, 3, 160, 136), torch.float32, tile)
    run("fp8 by tokens", floats(None, "token"), (3, 2, 3, 72, 40), torch.float32, tile)
    run("fp8 by measured scales", floats(None, "tensor"), (3, 2, 3, 72, 40), torch.float32, tile)
print(json.dumps(errors))
