"""Experts in every packed format, all at once, beside the same experts one by one through their linears' own kernels."""

import pytest
import torch

from llmd_kernels import experts, fp8_linear, grouped_linear, int8_linear
from llmd_kernels.silu_mul import silu_mul

SHAPES = [(1, 2, 5), (16, 4, 12), (90, 2, 3), (700, 2, 4)]  # tokens, k, experts: each kind of tile


def dense(width, depth, device):
    return torch.randn(width, depth, device=device) / depth**0.5


def in_groups(bits, group_size, *, has_offset=False, has_columns=False):
    def make(width, depth, device):
        q = torch.randint(0, 1 << bits, (width, depth), dtype=torch.uint8, device=device)
        scale = (torch.rand(width, depth // group_size, device=device) + 0.5) / (1 << (bits - 1)) / depth**0.5
        offset = -(1 << (bits - 1)) * scale * 1.1 if has_offset else None
        columns = torch.randperm(depth, device=device) if has_columns else None
        zero = 0 if has_offset else 1 << (bits - 1)
        return grouped_linear.pack(q, scale, offset, bits=bits, group_size=group_size, zero=zero, columns=columns)

    return make


def eight_bits(width, depth, device):
    return int8_linear.quantize(dense(width, depth, device))


def floats(block, activations):
    def make(width, depth, device):
        stored, scale = fp8_linear.quantize_weight(dense(width, depth, device), block)
        x_scale = torch.full((1,), 0.01, device=device) if activations == "tensor" else None
        return experts.Fp8Weight(stored, scale, block, activations, x_scale)

    return make


FORMATS = {
    "int4": in_groups(4, 32),
    "int4 by 128 with offsets": in_groups(4, 128, has_offset=True),
    "int4 by 64 in an order": in_groups(4, 64, has_columns=True),
    "int8 by 32": in_groups(8, 32),
    "int8": eight_bits,
    "fp8": floats(None, "float"),
    "fp8 by tokens": floats(None, "token"),
    "fp8 by blocks": floats((128, 128), "group"),
    "fp8 by measured scales": floats(None, "tensor"),
}


def stacked(count, make, *sizes):
    each, stack = [make(*sizes) for _ in range(count)], experts.Stack(count)
    for number, weight in enumerate(each):
        stack.take(number, weight)
    return experts.ExpertWeights(each, stack.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_they_give_what_their_linears_give(form, dtype, device):
    torch.manual_seed(0)
    bound = 5e-2 if form.startswith("fp8 by") else 2e-2  # what is between the products may fall on another e4m3
    for tokens, k, count in SHAPES:
        gate_up, down = (stacked(count, FORMATS[form], *sizes, device) for sizes in ((256, 256), (256, 128)))
        x = torch.randn(tokens, 256, device=device).to(dtype)
        ids, weights = experts.route(torch.randn(tokens, count, device=device), k, normalized=True)
        if device.type == "cuda":
            assert experts.why_not(gate_up, down, device) is None
        got = experts.experts(x, ids, weights, gate_up, down)
        expected = experts.reference.experts(x, ids, weights, gate_up, down, silu_mul).double()
        assert (got.double() - expected).norm() / expected.norm() < bound, (tokens, k, count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_routes_and_shared_experts(dtype, device):
    torch.manual_seed(0)
    for tokens, count, k in ((1, 8, 2), (300, 128, 8), (7, 60, 4)):
        logits = torch.randn(tokens, count, device=device).to(dtype).round(decimals=1)  # ties
        ids, weights = experts.route(logits, k, normalized=True)
        expected = experts.reference.route(logits, k, normalized=True)
        torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)
        if device.type == "cpu" or dtype == torch.float32:
            assert torch.equal(ids.sort(1).values, expected[0].sort(1).values)
    y, x, gate = (torch.randn(9, size, device=device).to(dtype) for size in (300, 300, 1))
    torch.testing.assert_close(experts.add_gated(y, x, gate), experts.reference.add_gated(y, x, gate), rtol=2e-2, atol=2e-2)
