"""Paged attention: the C++ kernel and torch's SDPA against the reference; odd sizes, windows, garbage in free slots."""

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.paged_attention import cpu, paged_attention, reference

CASES = {
    "one": ([1], [1]),
    "mixed": ([5, 130, 77, 1], [5, 1, 70, 1]),
    "long": ([2500, 40, 1100], [1, 40, 300]),  # decodes over more than one part
}
HEADS = [(6, 2, 20, 3), (3, 1, 64, 16), (14, 2, 64, 16), (4, 4, 128, 16), (7, 7, 80, 5), (40, 1, 8, 7)]


def make_inputs(lengths, counts, heads, kv_heads, dim, block_size, dtype, kv_dtype=None):
    torch.manual_seed(0)
    num_blocks = sum(-(-length // block_size) for length in lengths) + 3
    pool = torch.randn(num_blocks, 3, 2, block_size, kv_heads, dim).to(kv_dtype or dtype)
    pool[0] = float("nan")
    order = (torch.randperm(num_blocks - 1) + 1).to(torch.int32)
    tables = torch.zeros(9, max(lengths) // block_size + 2, dtype=torch.int32)
    rows, used = torch.randperm(9)[: len(lengths)], 0
    for row, length in zip(rows, lengths, strict=True):
        held = -(-length // block_size)
        tables[row, :held] = order[used : used + held]
        used += held
        if length % block_size:  # slots that nobody has written yet
            pool[tables[row, held - 1].item(), :, :, length % block_size :] = float("nan")
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    q = torch.randn(sum(counts), (heads + 2) * dim).to(dtype)[:, : heads * dim].view(-1, heads, dim)
    return q, pool[:, 1], tables, rows, starts, torch.tensor(lengths, dtype=torch.int32), dim**-0.5


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, heads, dtype, window):
    inputs = make_inputs(*CASES[case], *heads, dtype)
    expected = reference.paged_attention(*inputs, window)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(cpu.paged_attention_sdpa(*inputs, window), expected, rtol=tolerance, atol=tolerance)
    if native.library() is not None:
        torch.testing.assert_close(cpu.paged_attention(*inputs, window), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_cache_of_another_dtype(dtype, kv_dtype):
    inputs = make_inputs(*CASES["mixed"], 6, 2, 20, 3, dtype, kv_dtype)
    expected = reference.paged_attention(*inputs)
    torch.testing.assert_close(paged_attention(*inputs), expected, rtol=2e-2, atol=2e-2)


def test_a_row_does_not_depend_on_its_batch_nor_on_chunks():
    """Bit for bit: tiles start at fixed positions, whatever was computed in earlier steps."""
    if native.library() is None:
        pytest.skip("no compiler")
    q, kv, tables, rows, _, lengths, scale = make_inputs([300, 70], [300, 70], 6, 2, 20, 16, torch.float32)
    both = paged_attention(q, kv, tables, rows, torch.tensor([0, 300, 370], dtype=torch.int32), lengths, scale)
    for start, end in ((0, 300), (0, 7), (7, 150), (150, 299), (299, 300)):
        bounds, length = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        alone = paged_attention(q[start:end], kv, tables, rows[:1], bounds, length, scale)
        assert torch.equal(alone, both[start:end])


def test_shapes_are_checked():
    q, kv, *rest = make_inputs([3], [3], 6, 2, 20, 16, torch.float32)
    with pytest.raises(ValueError, match="does not fit a cache"):
        paged_attention(q[:, :5], kv, *rest)
