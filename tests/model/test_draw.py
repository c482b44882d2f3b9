"""The arithmetic of drawing against plain Python and torch's own sort, argmax and topk."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.sampling_reference import python_uniform

from llmd.model.draw import _by_counting, _by_sorting, first_max, largest, pick, pick_among, uniforms, value_reaching


@given(st.lists(st.tuples(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 1 << 24)), min_size=1, max_size=20))
def test_uniforms_are_the_same_in_plain_python(pairs):
    seeds, counters = (torch.tensor(column) for column in zip(*pairs, strict=True))
    assert uniforms(seeds, counters).tolist() == [python_uniform(*pair) for pair in pairs]


@pytest.mark.parametrize("vary", ["seed", "counter"])
def test_uniforms_are_uniform_and_uncorrelated(vary):
    run, still = torch.arange(200_000), torch.full((200_000,), 7)
    u = uniforms(run, still) if vary == "seed" else uniforms(still, run)
    counts = torch.histc(u.float(), bins=100, min=0, max=1).double()
    chi2 = ((counts - 2000) ** 2 / 2000).sum().item()
    assert 50 < chi2 < 160  # 99 degrees of freedom
    for lag in (1, 2, 16):
        pair = torch.stack([u[:-lag], u[lag:]])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 4 / math.sqrt(200_000)


@pytest.mark.parametrize("width", [1, 5, 127, 128, 129, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_max_is_argmax(width, dtype):
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    x[1], x[2], x[3, -1] = 0, float("-inf"), 100
    values, ids = first_max(x)
    assert ids.tolist() == x.argmax(1).tolist()
    assert values.tolist() == x.amax(1).tolist()
    x[0, width // 2] = math.nan
    values, _ = first_max(x)
    assert values.isnan().tolist() == [True] + [False] * 39


@pytest.mark.parametrize(("width", "count"), [(5, 3), (5, 9), (300, 128), (40_000, 128), (40_001, 100), (4097, 8)])
def test_largest_is_topk(width, count):
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(width)).bfloat16().float()
    x[1], x[2, 3:] = 1.0, float("-inf")
    values, ids = largest(x, count)
    assert torch.equal(values, x.topk(min(count, width), 1).values)
    assert torch.equal(x.gather(1, ids), values)


def naive_value_reaching(row: list[float], amounts: list[int], target: int) -> float:
    total = 0
    for value, amount in sorted(zip(row, amounts, strict=True), reverse=True):
        total += amount
        if total >= target:
            return value
    raise AssertionError("the amounts do not reach the target")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_value_reaching_is_a_descending_sort(data):
    floats = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-23, -1.0, -1.0 - 2**-23])
    width = data.draw(st.integers(1, 30))
    row = data.draw(st.lists(floats, min_size=width, max_size=width))
    amounts = data.draw(st.lists(st.integers(0, 1 << 40), min_size=width, max_size=width))
    amounts[0] += 1
    target = data.draw(st.integers(1, sum(amounts)))
    tensors = torch.tensor([row]), torch.tensor([amounts]), torch.tensor([target])
    for find in (value_reaching, _by_sorting, _by_counting):
        assert find(*tensors).item() == naive_value_reaching(row, amounts, target)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_pick_is_a_walk_through_the_cumulated_weights(data):
    width = data.draw(st.integers(1, 400))
    seed = data.draw(st.integers(0, 1 << 30))
    weight = torch.randint(0, 1 << 40, (3, width), generator=torch.Generator().manual_seed(seed))
    weight *= torch.randint(0, 2, (3, width), generator=torch.Generator().manual_seed(seed + 1))
    weight[:, -1] += 1
    uniform = torch.tensor(data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3))).double()
    expected = []
    for row, u in zip(weight.tolist(), uniform.tolist(), strict=True):
        drawn = min(int(u * float(sum(row))), sum(row) - 1)
        ends = itertools.accumulate(row)
        expected.append(next(index for index, end in enumerate(ends) if end > drawn))
    assert pick(weight, uniform).tolist() == expected
    shuffled = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    ids = shuffled.expand(3, width)
    assert pick_among(ids, weight.gather(1, ids), uniform).tolist() == expected
