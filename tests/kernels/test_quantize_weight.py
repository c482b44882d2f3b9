"""Weights to 8 and 4 bits: the compiled kernels against torch, and what they make of numbers that are none."""

import math

import pytest
import torch

from llmd_kernels import panels
from llmd_kernels.quantize_weight import GROUP_SIZES, quantize_channels, quantize_groups, reference

SHAPES = [(1, 1), (1, 96), (3, 130), (37, 53), (130, 67), (64, 896), (5, 2048)]


def weights(shape, dtype):
    torch.manual_seed(shape[0] * 1000 + shape[1])
    weight = torch.randn(shape) * 0.05
    weight[0, : shape[1] // 2] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channels_are_the_references(shape, dtype):
    weight = weights(shape, dtype)
    for found, wanted in zip(quantize_channels(weight), reference.quantize_channels(weight), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_groups_are_the_references(shape, dtype, size):
    """But for sums in another order, which may decide a tie between two scales."""
    weight = weights(shape, dtype)
    (codes, scale), (wanted, wanted_scale) = quantize_groups(weight, size), reference.quantize_groups(weight, size)
    assert (scale.dtype, scale.shape) == (wanted_scale.dtype, wanted_scale.shape)
    assert (scale == wanted_scale).float().mean() > 0.98
    assert (codes == wanted).float().mean() > 0.98
    errors = [
        float(((q.float() - 8) * s.float().repeat_interleave(size, 1)[:, : shape[1]] - weight.float()).norm())
        for q, s in ((codes, scale), (wanted, wanted_scale))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-5, 1.0, 3e4, 1e30])
def test_groups_of_any_size_get_scales_that_float16_holds(size):
    weight = weights((9, 200), torch.float32) * size
    codes, scale = quantize_groups(weight, 32)
    _, wanted_scale = reference.quantize_groups(weight, 32)
    assert torch.equal(scale.isfinite(), wanted_scale.isfinite())
    same = scale.isfinite()
    assert (scale[same] == wanted_scale[same]).float().mean() > 0.98
    assert int(codes[same.repeat_interleave(32, 1)[:, :200]].max()) <= 15 if bool(same.any()) else True


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_shows_in_its_scale(value):
    weight = weights((8, 150), torch.bfloat16)
    weight[3, 149] = value
    for scale in (quantize_channels(weight)[1], quantize_groups(weight, 64)[1][:, -1]):
        assert not scale[3].isfinite()
        assert scale[torch.arange(8) != 3].isfinite().all()


def test_a_view_with_gaps_is_taken_as_it_is():
    weight = weights((64, 896), torch.float32)[:, ::2]
    assert torch.equal(quantize_channels(weight)[0], quantize_channels(weight.contiguous())[0])
    assert torch.equal(quantize_groups(weight, 32)[0], quantize_groups(weight.contiguous(), 32)[0])


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="group_size"):
        quantize_groups(torch.randn(2, 96), 48)


@pytest.mark.parametrize("shape", [(1, 16), (16, 64), (37, 80), (130, 896)])
def test_quads_are_those_of_torch(shape, monkeypatch):
    q = torch.randint(0, 256, shape, dtype=torch.uint8)
    packed = panels.quads(q)
    assert torch.equal(panels.rows(packed)[: shape[0]], q)
    monkeypatch.setattr(panels.native, "library", lambda: None)
    assert torch.equal(packed, panels.quads(q))
