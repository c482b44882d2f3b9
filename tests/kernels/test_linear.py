"""The row-major bfloat16 product against float32, at odd sizes, over and under the rows where it takes over."""

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.linear import linear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "depth"), [(1, 1, 1), (1, 7, 33), (2, 130, 896), (3, 66, 31), (5, 65, 100), (48, 64, 64), (60, 9, 70)]
)
def test_linear(rows, width, depth, has_bias):
    torch.manual_seed(0)
    x = torch.randn(rows, 2 * depth).bfloat16()[:, :depth]
    weight, bias = torch.randn(width, depth).bfloat16(), torch.randn(width).bfloat16() if has_bias else None
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float() if has_bias else None)
    scale = depth**0.5
    for out_dtype, tolerance in ((torch.float32, 1e-2 if rows > 48 else 1e-4), (torch.bfloat16, 1e-2)):
        actual = linear(x, weight, bias, out_dtype=out_dtype)
        assert actual.dtype == out_dtype
        torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=tolerance * scale)


def test_a_row_is_the_same_in_every_small_batch():
    if native.library() is None:
        pytest.skip("no compiler")
    torch.manual_seed(0)
    x, weight = torch.randn(48, 200).bfloat16(), torch.randn(77, 200).bfloat16()
    together = linear(x, weight)
    for rows in (1, 2, 3, 5, 16):
        assert torch.equal(linear(x[:rows], weight), together[:rows])


def test_float32_is_plain():
    x, weight = torch.randn(3, 20), torch.randn(5, 20)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
