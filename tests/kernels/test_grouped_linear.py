"""Weights of 4 and 8 bits with scales by group, against the formula."""

import pytest
import torch

from llmd_kernels.grouped_linear import grouped_linear, pack, unpack


def made(width, depth, bits, group_size, *, has_offset=False, has_columns=False, seed=0):
    """A packed weight and its dense form, by the formula."""
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


@pytest.mark.parametrize(
    "change", [{"bits": 3}, {"group_size": 16}, {"q": torch.zeros(4, 64)}, {"q": torch.zeros(4, dtype=torch.uint8)}]
)
def test_what_does_not_go_together_is_refused(change):
    given = {"q": torch.zeros(4, 64, dtype=torch.uint8), "scale": torch.ones(4, 2), "bits": 4, "group_size": 32, **change}
    with pytest.raises((ValueError, IndexError)):
        pack(**given)


def test_the_input_must_fit():
    weight, _ = made(4, 64, 4, 32)
    with pytest.raises(ValueError, match="grouped_linear wants x"):
        grouped_linear(torch.zeros(2, 63), weight)
