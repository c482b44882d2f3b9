"""Weights as codes into a table of 16 values, against the formula."""

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.codebook_linear import codebook_linear, pack, unpack


def made(width, depth, group_size):
    """A packed weight and its dense form, by the formula."""
    torch.manual_seed(0)
    q = torch.randint(0, 16, (width, depth), dtype=torch.uint8)
    scale = (torch.rand(width, -(-depth // group_size)) * 0.1 + 0.01).half()
    codebook = torch.randn(16)
    dense = codebook[q.long()] * scale.float()[:, torch.arange(depth) // group_size]
    return pack(q, scale, codebook, group_size=group_size), dense


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(
    ("width", "depth", "group_size"), [(5, 64, 64), (33, 192, 32), (17, 131, 64), (64, 4096, 64), (7, 48, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products(monkeypatch, is_native, width, depth, group_size, dtype, has_bias):
    if not is_native:
        monkeypatch.setattr(native, "library", lambda: None)
    weight, dense = made(width, depth, group_size)
    torch.testing.assert_close(unpack(weight), dense)
    bias = torch.randn(width).to(dtype) if has_bias else None
    for count in (1, 2, 3, 4, 7, 200):
        x = torch.randn(count, depth).to(dtype)
        wanted = x.float() @ dense.T + (0 if bias is None else bias.float())
        found = codebook_linear(x, weight, bias)
        assert found.dtype == dtype
        assert ((found.float() - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_row_is_the_same_in_every_batch():
    weight, _ = made(40, 256, 64)
    x = torch.randn(16, 256)
    whole = codebook_linear(x, weight)
    for index in range(16):
        assert torch.equal(codebook_linear(x[index : index + 1], weight)[0], whole[index])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_lie_apart_and_scales_be_of_any_dtype(dtype, scale_dtype):
    q, codebook = torch.randint(0, 16, (20, 128), dtype=torch.uint8), torch.randn(16)
    scale = torch.tensor([[2.0**-20, 3.0]]).expand(20, 2).to(scale_dtype)  # the first below float16's normal numbers
    weight = pack(q, scale.contiguous(), codebook, group_size=64)
    x = torch.randn(5, 300).to(dtype)[:, 1:129]
    wanted = x.float() @ (codebook[q.long()] * scale.float().repeat_interleave(64, 1)).T
    assert ((codebook_linear(x, weight).float() - wanted).norm() / wanted.norm()) < 1e-2


def test_shapes_that_do_not_agree():
    weight, _ = made(5, 64, 64)
    with pytest.raises(ValueError, match=r"wants x \[M, 64\], got \(2, 32\)"):
        codebook_linear(torch.randn(2, 32), weight)
    with pytest.raises(ValueError, match=r"wants scale \[5, 1\], got \(5, 2\)"):
        pack(torch.zeros(5, 64, dtype=torch.uint8), torch.ones(5, 2), torch.zeros(16), group_size=64)
    with pytest.raises(ValueError, match="16 values"):
        pack(torch.zeros(5, 64, dtype=torch.uint8), torch.ones(5, 1), torch.zeros(8), group_size=64)
