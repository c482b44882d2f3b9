"""The CPU's sampling against whole rows sorted by torch: the same token for every row, whatever it asks."""

import math

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.sampling import Knobs, cpu, reference

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")

LINES = 40


def make_knobs(width, seed=0):
    """Every mixture of temperature, top_k, top_p and min_p, in lines of no order."""
    generator = torch.Generator().manual_seed(seed)

    def some(*values):
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (LINES,), generator=generator)]

    values = torch.stack(
        [
            some(0, 1 / 2, 1, 1 / 1.3, 100).float().double(),
            some(width, width, 1, min(5, width), min(50, width), min(900, width)),
            some(1, 1, 0.9, 0.5, 0.999, 0.01),
            some(0, 0, 0.1, 1e-4, 1).float().double(),
        ],
        dim=1,
    )
    return Knobs(torch.randint(-(2**62), 2**62, (LINES,), generator=generator), values)


def special_rows(width, scale):
    """All equal; many ties; one that towers; the rest random."""
    x = torch.randn(24, width, generator=torch.Generator().manual_seed(width)) * scale
    x[0] = 0.25
    x[1] = (x[1] * 2).round() / 2
    x[2, width // 2] = 90
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("width", [1, 15, 127, 129, 1000, 5003])
def test_as_sorted(width, scale, dtype):
    x = special_rows(width, scale).to(dtype)
    for seed in range(3):
        knobs = make_knobs(width, seed)
        rows = torch.randperm(LINES, generator=torch.Generator().manual_seed(seed))[: len(x)]
        counters = torch.arange(len(x)) * 7 + seed
        tokens, best = cpu.sample(x, rows, counters, knobs)
        expected, expected_best = reference.sample(x, rows, counters, knobs)
        assert tokens.tolist() == expected.tolist()
        assert torch.equal(best, expected_best)


def test_rows_may_be_strided_and_alone():
    x, knobs = special_rows(1000, 2.0), make_knobs(640)
    rows = torch.arange(24)
    together = cpu.sample(x[:, :640], rows, rows, knobs)[0]
    for i in range(24):
        one = rows[i : i + 1]
        assert cpu.sample(x[i : i + 1, :640].clone(), one, one, knobs)[0] == together[i]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 511, 999])
@pytest.mark.parametrize("line", [(0, 1000, 1, 0), (1, 1000, 1, 0), (1, 10, 0.9, 0.1), (1, 1000, 0.5, 0)])
def test_a_broken_row_is_told_and_is_the_only_one(bad, place, line):
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    knobs = Knobs(torch.arange(3), torch.tensor([line] * 3, dtype=torch.float64))
    rows = counters = torch.arange(3)
    expected = cpu.sample(x, rows, counters, knobs)[0].tolist()
    x[1, place] = bad
    tokens, best = cpu.sample(x, rows, counters, knobs)
    assert not math.isfinite(best[1])
    assert 0 <= tokens[1] < 1000
    assert [tokens[0].item(), tokens[2].item()] == [expected[0], expected[2]]


def test_no_token_left_is_told():
    x, first = torch.full((1, 300), -math.inf), torch.tensor([0])
    tokens, best = cpu.sample(x, first, first, Knobs(first, torch.tensor([[1, 300, 1, 0]], dtype=torch.float64)))
    assert best[0] == -math.inf
    assert 0 <= tokens[0] < 300


@pytest.mark.parametrize("line", [(1, 50, 1, 0), (1, 5003, 0.9, 0), (1, 5003, 1, 0.02), (1, 5003, 1, 0)])
def test_barred_tokens_are_never_drawn(line):
    x = torch.randn(64, 5003, generator=torch.Generator().manual_seed(3))
    x[:, 100:] = -math.inf
    knobs = Knobs(torch.arange(64), torch.tensor([line] * 64, dtype=torch.float64))
    rows = torch.arange(64)
    tokens, _ = cpu.sample(x, rows, rows, knobs)
    assert tokens.max() < 100
    assert len(set(tokens.tolist())) > 10
