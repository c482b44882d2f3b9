"""Attention of encoders against the plain one: odd lengths, windows shorter and longer than a sequence, shared heads."""

import pytest
import torch

from llmd_kernels.encoder_attention import encoder_attention, padded_attention
from llmd_kernels.encoder_attention.reference import encoder_attention as reference

LENGTHS = [7, 1, 300, 33, 257]


@pytest.mark.parametrize("window", [None, 0, 5, 100, 299])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 20), (4, 2, 64)])
def test_against_the_reference(window, heads, kv_heads, dim):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), count, dim, generator=generator) for count in (heads, kv_heads, kv_heads))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    found = encoder_attention(q, k, v, starts, LENGTHS, 0.2, window)
    assert found.is_contiguous()
    expected = reference(q, k, v, LENGTHS, 0.2, window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    padded = padded_attention(q, k, v, LENGTHS, 0.2, window)
    assert padded.is_contiguous()
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 5, 100])
def test_one_launch_on_a_gpu(window, dtype):
    q, k, v = (torch.randn(sum(LENGTHS), 4, 64, dtype=dtype, device="cuda") for _ in range(3))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).cuda()
    found = encoder_attention(q, k, v, starts, LENGTHS, 0.125, window)
    torch.testing.assert_close(found, reference(q, k, v, LENGTHS, 0.125, window), atol=2e-2, rtol=2e-2)
