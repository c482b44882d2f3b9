"""Prints the relative errors of the product of few rows in the interpreter, by case; x, W and bias lie among NaNs."""

import json

import torch
import torch.nn.functional as F

from llmd_kernels.linear import triton as kernels
from llmd_kernels.linear.table import Tile

kernels.num_processors = lambda device: 8
GATES = {
    kernels.SILU: F.silu, kernels.GELU: F.gelu, kernels.GELU_TANH: lambda gate: F.gelu(gate, approximate="tanh"),
}  # fmt: skip
# rows, outputs, depth, tile, kind: blocks and depths that are not whole, shares of unequal size and of nothing
CASES = [
    (1, 37, 130, Tile(1, 4, 64, 1, 1, 1), kernels.PLAIN),
    (2, 38, 256, Tile(2, 8, 128, 1, 1, 1), kernels.SILU),
    (1, 12, 34, Tile(2, 8, 64, 1, 1, 1), kernels.GELU),
    (5, 70, 300, Tile(16, 32, 64, 4, 4, 2), kernels.PLAIN),
    (16, 40, 288, Tile(16, 16, 32, 8, 4, 2), kernels.SILU),
    (3, 66, 64, Tile(16, 32, 32, 1, 4, 2), kernels.GELU_TANH),
    (33, 48, 160, Tile(64, 64, 32, 2, 4, 2), kernels.PLAIN),
]


def made(rows, width, depth, dtype):
    """x and W with rows that lie apart, NaNs between them, and a bias."""
    torch.manual_seed(0)
    x, weight = (torch.full((size, depth + 6), torch.nan).to(dtype) for size in (rows, width))
    x[:, :depth], weight[:, :depth] = torch.randn(rows, depth), torch.randn(width, depth)
    return x[:, :depth], weight[:, :depth], torch.randn(width).to(dtype)


def plainly(x, weight, bias, kind):
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if kind == kernels.PLAIN:
        return y
    gate, up = y.chunk(2, 1)
    return GATES[kind](gate) * up


errors = {}
for rows, width, depth, tile, kind in CASES:
    for dtype in (torch.float16, torch.bfloat16):
        if dtype == torch.bfloat16 and tile.block_m > 2:
            continue  # the interpreter's dot takes bfloat16 for integers
        x, weight, bias = made(rows, width, depth, dtype)
        for some_bias in (bias, None):
            y, expected = (
                kernels.linear(x, weight, some_bias, torch.float32, tile, kind),
                plainly(x, weight, some_bias, kind),
            )
            name = f"{rows} {width} {depth} {tile} {kind} {dtype} {some_bias is not None}"
            errors[name] = float((y - expected).abs().max() / expected.abs().max())
            assert not kernels.arrivals(x.device).any(), name
        for row in {0, rows - 1}:  # alone as in company
            assert torch.equal(kernels.linear(x[row : row + 1], weight, None, torch.float32, tile, kind), y[row : row + 1])
print(json.dumps(errors))
