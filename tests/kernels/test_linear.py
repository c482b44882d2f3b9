"""The row-major bfloat16 product against float32, at odd sizes, on both sides of where one way takes over from another."""

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.linear import linear, ways

SIZES = [  # rows, width, depth
    (1, 1, 1), (1, 7, 33), (2, 130, 896), (3, 66, 31), (4, 5, 4865), (5, 65, 100), (7, 33, 1537), (8, 9, 70), (17, 18, 64),
    (48, 64, 64), (64, 35, 3100), (65, 64, 64), (66, 1, 33), (67, 129, 897), (131, 15, 5155), (1050, 20, 40),
    (1040, 3, 2600),
]  # fmt: skip
FEW = 64  # the most rows that are read by dot products


@pytest.fixture(autouse=True)
def always_ours(monkeypatch):
    """Whatever this processor would be better served by."""
    if native.library() is None:
        pytest.skip("no compiler")
    monkeypatch.setattr("llmd_kernels.linear.max_rows", lambda: ways.ALL)


def made(rows, width, depth):
    """x with rows that lie apart, a NaN between them; W with rows that lie apart; a bias."""
    torch.manual_seed(0)
    x = torch.full((rows, depth + 3), torch.nan).bfloat16()
    x[:, :depth] = torch.randn(rows, depth)
    weight = torch.full((width, depth + 5), torch.nan).bfloat16()
    weight[:, :depth] = torch.randn(width, depth)
    return x[:, :depth], weight[:, :depth], torch.randn(width).bfloat16()


def check(x, weight, bias):
    expected = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    scale = x.shape[1] ** 0.5
    for out_dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        actual = linear(x, weight, bias, out_dtype=out_dtype)
        assert actual.dtype == out_dtype
        torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=tolerance * scale)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "depth"), SIZES)
def test_linear(rows, width, depth, has_bias):
    x, weight, bias = made(rows, width, depth)
    check(x, weight, bias if has_bias else None)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(rows, threads):
    x, weight, bias = made(rows, 700, 900)
    expected = linear(x, weight, bias)
    native.set_num_threads(threads)
    try:
        assert torch.equal(linear(x, weight, bias), expected)
    finally:
        native.set_num_threads(torch.get_num_threads())


def test_no_rows_and_no_depth():
    x, weight, bias = made(70, 9, 4)
    assert linear(x[:0], weight, bias).shape == (0, 9)
    for rows in (3, 70):
        assert torch.equal(linear(x[:rows, :0], weight[:, :0], bias), bias.expand(rows, -1))


def test_columns_of_x_may_lie_apart():
    x, weight, _ = made(9, 20, 40)
    assert torch.equal(linear(x.t().contiguous().t(), weight), linear(x, weight))


@pytest.mark.parametrize("depth", [200, 2001, 4864])
def test_a_row_is_the_same_in_every_small_batch(depth):
    x, weight, bias = made(FEW, 77, depth)
    together = linear(x, weight, bias)
    for rows in (1, 2, 3, 4, 5, 16, 33):
        assert torch.equal(linear(x[:rows], weight, bias), together[:rows])
    assert torch.equal(linear(x[9:10], weight, bias), together[9:10])


def test_a_row_is_the_same_in_every_large_batch():
    x, weight, bias = made(2100, 70, 300)
    together = linear(x, weight, bias)
    for begin, end in ((0, 65), (0, 512), (3, 1100), (2027, 2100)):
        assert torch.equal(linear(x[begin:end], weight, bias), together[begin:end])


@pytest.mark.parametrize("rows", [3, 64, 65])
def test_what_is_not_finite_stays_in_its_row(rows):
    x, weight, _ = made(rows, 20, 100)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    y = linear(x, weight)
    assert not y[1].isfinite().any()
    assert y[2].isnan().all()
    assert y[[i for i in range(rows) if i not in (1, 2)]].isfinite().all()


def test_float32_is_plain():
    x, weight = torch.randn(3, 20), torch.randn(5, 20)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)


def test_the_way_is_chosen_by_what_the_processor_has():
    assert ways.choose(has_amx=False, capability="AVX512") == ways.ALL
    assert ways.choose(has_amx=True, capability="AVX512") == 8
    assert ways.choose(has_amx=False, capability="AVX2") == ways.choose(has_amx=False, capability="DEFAULT") == 0
