"""Weights of 4 and 8 bits with scales by group, against the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd_kernels import native
from llmd_kernels.grouped_linear import GroupedWeight, grouped_linear, pack, unpack
from llmd_kernels.grouped_linear.tiles import tile_for


def made_parts(width, depth, bits, group_size, *, has_offset=False, has_columns=False, seed=0):
    """q, scale, offset, columns and zero, and the dense form by the formula."""
    torch.manual_seed(seed)
    q = torch.randint(0, 1 << bits, (width, depth), dtype=torch.uint8)
    num_groups = -(-depth // group_size)
    scale = (torch.rand(width, num_groups) * 0.02 + 0.001).half()
    offset = (torch.randn(width, num_groups) * 0.05).half() if has_offset else None
    columns = torch.randperm(depth) if has_columns else None
    zero = 0 if has_offset else 1 << (bits - 1)
    group = torch.arange(depth) // group_size
    dense = (q.float() - zero) * scale.float()[:, group] + (0 if offset is None else offset.float()[:, group])
    if columns is not None:
        dense = dense[:, columns.argsort()]
    return (q, scale, offset, columns, zero), dense


def made(width, depth, bits, group_size, **what):
    """A packed weight and its dense form."""
    (q, scale, offset, columns, zero), dense = made_parts(width, depth, bits, group_size, **what)
    return pack(q, scale, offset, bits=bits, group_size=group_size, zero=zero, columns=columns), dense


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("width", "depth", "group_size"), [(5, 64, 32), (33, 96, 32), (17, 131, 131), (64, 256, 128), (7, 80, 16)]
)
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("has_columns", [False, True])
def test_weights_come_back(bits, width, depth, group_size, has_offset, has_columns):
    weight, dense = made(width, depth, bits, group_size, has_offset=has_offset, has_columns=has_columns)
    torch.testing.assert_close(unpack(weight), dense)
    x = torch.randn(3, depth)
    bias = torch.randn(width)
    wanted = x @ dense.T + bias
    error = (grouped_linear(x, weight, bias) - wanted).norm() / wanted.norm()
    assert error < 1e-2


def error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 100),
    depth=st.integers(1, 700),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([16, 24, 32, 48, 64, 100, 128, 1000]),
    has_offset=st.booleans(),
    has_columns=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_within_a_hundredth_of_the_dense_product(rows, width, depth, bits, group_size, has_offset, has_columns, dtype):
    weight, dense = made(width, depth, bits, group_size, has_offset=has_offset, has_columns=has_columns)
    x = torch.randn(rows, 2 * depth).to(dtype)[:, :depth]
    actual, expected = grouped_linear(x, weight), x.float() @ dense.T
    assert actual.dtype == dtype
    # Of a single small number little may be left: the bound is on what a product of that size can lose, by ill luck too.
    size = float(expected.norm()) + 2.5 * float(x.float().norm() * dense.norm()) / max(1, depth) ** 0.5
    assert float((actual.double() - expected.double()).norm()) < 1e-2 * size
    torch.testing.assert_close(unpack(weight), dense)


def test_outliers_of_x_cost_their_block_alone():
    weight, dense = made(64, 1024, 4, 128)
    x = torch.randn(4, 1024)
    x[:, 700] = 1000.0
    exact = grouped_linear(x, weight) - x[:, 640:704] @ dense[:, 640:704].T
    rest = torch.cat((x[:, :640], x[:, 704:]), 1) @ torch.cat((dense[:, :640], dense[:, 704:]), 1).T
    assert error(exact, rest) < 0.5  # an outlier's block is off by up to half a step of it, the others are not
    assert error(grouped_linear(x, weight), x @ dense.T) < 1e-2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_offset", [False, True])
def test_a_row_is_the_same_in_every_batch(bits, has_offset):
    weight, _ = made(77, 300, bits, 64, has_offset=has_offset)
    x, bias = torch.randn(130, 300).bfloat16(), torch.randn(77)
    if native.library() is None:
        pytest.skip("no compiler")
    together = grouped_linear(x, weight, bias)
    for start, end in ((0, 1), (3, 5), (7, 10), (20, 27), (64, 80), (129, 130)):
        assert torch.equal(grouped_linear(x[start:end], weight, bias), together[start:end])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row(dtype, value):
    weight, _ = made(40, 200, 4, 32, has_offset=True)
    x = torch.randn(9, 200).to(dtype)
    clean = grouped_linear(x, weight)
    x[4, 150] = value
    actual = grouped_linear(x, weight)
    assert not torch.isfinite(actual[4]).any()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(actual[others], clean[others])


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 1e4, 1e30])
def test_extreme_activations_stay_finite(value):
    weight, _ = made(20, 100, 8, 32)
    assert torch.isfinite(grouped_linear(torch.full((2, 100), value), weight)).all()


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_scales_beyond_float16_are_kept(size):
    torch.manual_seed(0)
    q = torch.randint(0, 16, (20, 64), dtype=torch.uint8)
    scale = (torch.rand(20, 2) + 0.1) * size
    weight = pack(q, scale, -7 * scale, bits=4, group_size=32)
    dense = (q.float() - 7) * scale.repeat_interleave(32, 1)
    assert error(unpack(weight), dense) < 1e-3
    x = torch.randn(3, 64)
    assert error(grouped_linear(x, weight), x @ dense.T) < 1e-2


@pytest.mark.parametrize(
    ("bits", "group_size", "has_offset", "most"),
    [(4, 32, False, 0.30), (4, 64, True, 0.30), (4, 128, True, 0.30), (8, 32, False, 0.54), (8, 128, True, 0.53)],
)
def test_memory_is_as_promised(bits, group_size, has_offset, most):
    weight, dense = made(1152, 896, bits, group_size, has_offset=has_offset)
    size = sum(field.nbytes for field in weight if isinstance(field, torch.Tensor))
    assert size <= most * 2 * dense.numel()


def test_tensors_may_move_into_buffers_and_back():
    weight, dense = made(20, 96, 4, 32, has_offset=True, has_columns=True)
    copy = GroupedWeight(*(field.clone() if isinstance(field, torch.Tensor) else field for field in weight))
    torch.testing.assert_close(unpack(copy), dense)


def test_few_rows_are_split_among_programs_of_a_gpu():
    assert tile_for(1, 4096, 224).split == 8
    assert tile_for(1, 1 << 17, 64).split == 1
    assert tile_for(1, 4096, 224).block_n < tile_for(1, 1 << 17, 64).block_n
    assert tile_for(16, 512, 8).split == 2
    assert tile_for(17, 512, 224).split == 8
    assert tile_for(65, 512, 224).split == 1
    assert tile_for(5000, 512, 8).block_m == 128


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"group_size": 16},
        {"group_size": 0},
        {"q": torch.zeros(4, 64)},
        {"q": torch.zeros(4, dtype=torch.uint8)},
        {"q": torch.zeros(0, 64, dtype=torch.uint8)},
        {"zero": 16},
        {"offset": torch.ones(4, 3)},
        {"columns": torch.arange(63)},
    ],
)
def test_what_does_not_go_together_is_refused(change):
    arguments = {
        "q": torch.zeros(4, 64, dtype=torch.uint8),
        "scale": torch.ones(4, 2),
        "bits": 4,
        "group_size": 32,
        **change,
    }
    with pytest.raises(ValueError, match="pack wants"):
        pack(**arguments)


def test_the_input_must_fit():
    weight, _ = made(4, 64, 4, 32)
    with pytest.raises(ValueError, match="grouped_linear wants x"):
        grouped_linear(torch.zeros(2, 63), weight)
