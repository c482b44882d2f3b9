"""Prints the relative error of the quantized products' Triton kernels in the interpreter, by case."""

import json

import torch
from kernels.test_fp8_linear import made as made_fp8
from kernels.test_grouped_linear import made_parts

from llmd_kernels import fp8_linear, int8_linear
from llmd_kernels.fp8_linear import triton as fp8
from llmd_kernels.grouped_linear import GroupedWeight
from llmd_kernels.grouped_linear import triton as grouped
from llmd_kernels.int8_linear import triton as int8
from llmd_kernels.quantize_weight.reference import quantize_channels

errors = {}


def compare(name, actual, expected):
    errors[name] = float((actual.double() - expected.double()).norm() / expected.double().norm())


# rows, width, depth, bits, group size, with offsets, in another order: few rows are split, odd groups are not even
GROUPED = [
    (3, 70, 512, 4, 128, True, False),
    (2, 40, 300, 4, 96, True, False),
    (40, 40, 192, 8, 64, True, True),
    (66, 34, 256, 4, 128, False, False),
    (70, 20, 224, 4, 32, True, False),
    (1, 40, 1088, 4, 64, False, False),
    (3, 70, 600, 4, 32, True, True),
    (20, 66, 100, 4, 100, False, False),
    (2, 33, 90, 4, 16, True, False),
    (70, 130, 128, 8, 128, False, False),
    (5, 17, 77, 8, 24, True, True),
]
for rows, width, depth, bits, group_size, has_offset, has_columns in GROUPED:
    for dtype in (torch.float32, torch.float16):
        parts, dense = made_parts(width, depth, bits, group_size, has_offset=has_offset, has_columns=has_columns)
        q, scale, offset, columns, zero = parts
        x, bias = torch.randn(rows, 2 * depth).to(dtype)[:, :depth], torch.randn(width)
        weight = GroupedWeight(
            grouped.pack(q, bits), (scale.float() / 4).half().T.contiguous(),
            None if offset is None else (offset.float() / 4).half().T.contiguous(),
            None if columns is None else columns.int(), bits, group_size, zero, depth, width, 4.0, "chunks",
        )  # fmt: skip
        actual = grouped.linear(x, weight, bias)
        assert torch.equal(grouped.unpack(grouped.pack(q, bits), bits, depth), q)
        compare(f"grouped {rows} {width} {depth} {bits} {group_size} {dtype}", actual, x.float() @ dense.T + bias)

for rows, width, depth, block, activations in [
    (1, 33, 300, None, "float"),
    (3, 130, 384, (128, 128), "float"),
    (20, 40, 200, (128, 128), "group"),
    (5, 70, 96, None, "token"),
    (70, 65, 130, (1, 130), "float"),
]:
    for dtype in (torch.float32, torch.float16):
        x, weight, scale, bias = made_fp8(rows, width, depth, block, dtype)
        grid, height, columns = fp8_linear.grid_of(weight, scale, block)
        tokens, x_scale = x, None
        if activations != "float":
            step = columns if activations == "group" else depth
            tokens, x_scale = fp8_linear.reference.quantize(x, step, None, grid.shape[1])
        assert fp8.why_not(columns, depth) is None
        arguments = (tokens, x_scale, weight, grid, height, columns, bias)
        compare(
            f"fp8 {rows} {width} {depth} {block} {activations} {dtype}",
            fp8.linear(*arguments), fp8_linear.reference.linear(*arguments),
        )  # fmt: skip
for columns, given in ((64, None), (150, None), (150, 0.01)):
    x = torch.randn(5, 300)[:, :150] * torch.tensor([1.0, 1e-3, 1e4, 0.0, 1.0])[:, None]
    x_scale = None if given is None else torch.tensor(given)
    rounded, scales = fp8.quantize(x, columns, x_scale, -(-150 // columns))
    expected, expected_scales = fp8_linear.reference.quantize(x, columns, x_scale, -(-150 // columns))
    assert torch.equal(scales, expected_scales)
    same = rounded.float() == expected.float()  # but for quotients that round one way or another
    assert same.float().mean() > 0.98
    assert ((rounded - expected).abs() <= expected.abs() / 8 + 2**-9).all()
    assert torch.equal(rounded.to(torch.float8_e4m3fn).float(), rounded.float())
every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
stored = every[~torch.isnan(every.float())].unsqueeze(1)
widened = fp8.linear(torch.ones(1, 1), None, stored, torch.ones(1, 1), stored.shape[0], 1, None)[0]
assert torch.equal(widened, stored.float()[:, 0])
not_numbers = torch.tensor([[0x7F], [0xFF]], dtype=torch.uint8).view(torch.float8_e4m3fn)
assert torch.isnan(fp8.linear(torch.ones(1, 1), None, not_numbers, torch.ones(1, 1), 2, 1, None)).all()

for rows, width, depth, x_scale, x_zero in [(1, 33, 300, None, 0), (20, 70, 130, 0.02, 0), (70, 130, 64, 0.03, -17)]:
    torch.manual_seed(0)
    x, bias = torch.randn(rows, 2 * depth)[:, :depth], torch.randn(width)
    weight, scale, sums = quantize_channels(torch.randn(width, depth))
    given = None if x_scale is None else torch.tensor(x_scale)
    expected = int8_linear.reference.int8_linear(x, weight, scale, bias, given, x_zero)
    compare(f"int8 {rows} {width} {depth}", int8.int8_linear(x, weight, scale, sums, bias, given, x_zero), expected)
x[3, 7] = float("nan")
assert torch.isnan(int8.int8_linear(x, weight, scale, sums, bias, None, 0)).all(1).nonzero().tolist() == [[3]]
x[2, 5], x[4, 1] = float("inf"), float("nan")
rows = fp8.quantize(x, 64, None, 1)[1]
assert torch.isnan(rows).any(1).nonzero().flatten().tolist() == sorted({2, 3, 4})
print(json.dumps(errors))
