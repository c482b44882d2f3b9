"""Paged attention: the C++ kernel and torch's SDPA against the reference; odd sizes, windows, garbage in free slots."""

import math

import pytest
import torch
from kernels.attention_calls import make_call

from llmd_kernels import native
from llmd_kernels.paged_attention import cpu, paged_attention, reference
from llmd_kernels.quantized_kv import dequantize

CASES = {
    "one": ([1], [1]),
    "mixed": ([5, 130, 77, 1], [5, 1, 70, 1]),
    "long": ([2500, 40, 1100], [1, 40, 300]),  # decodes over more than one part
}
HEADS = [(6, 2, 20, 3), (3, 1, 64, 16), (14, 2, 64, 16), (4, 4, 128, 16), (7, 7, 80, 5), (40, 1, 8, 7), (9, 1, 7, 4)]
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, heads, dtype, window):
    call = make_call(*CASES[case], *heads, dtype, window=window)
    expected = reference.paged_attention(call)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(cpu.paged_attention_sdpa(call), expected, rtol=tolerance, atol=tolerance)
    if native.library() is not None:
        torch.testing.assert_close(cpu.paged_attention(call), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_cache_of_another_dtype(dtype, kv_dtype):
    call = make_call(*CASES["mixed"], 6, 2, 20, 3, dtype, kv_dtype)
    torch.testing.assert_close(paged_attention(call), reference.paged_attention(call), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("kv_dtype", EIGHT_BITS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_cache_in_eight_bits(case, heads, kv_dtype, window):
    """The kernel adds no error to that of the cache: it equals attention over what the cache says."""
    call = make_call(*CASES[case], *heads, kv_dtype=kv_dtype, window=window)
    plain = call._replace(kv=dequantize(call.kv.data, call.kv.scales))
    expected = reference.paged_attention(plain)
    for way in (reference.paged_attention, cpu.paged_attention_sdpa, paged_attention):
        torch.testing.assert_close(way(call), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kv_dtype", EIGHT_BITS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_bfloat16_queries_over_a_cache_in_eight_bits(heads, kv_dtype):
    call = make_call(*CASES["long"], *heads, torch.bfloat16, kv_dtype)
    expected = reference.paged_attention(call._replace(q=call.q.float()))
    torch.testing.assert_close(paged_attention(call).float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("kv_dtype", "bound"), [(torch.int8, 0.01), (torch.float8_e4m3fn, 0.04)])
def test_eight_bits_are_near_the_truth(kv_dtype, bound):
    exact = paged_attention(make_call(*CASES["long"], 14, 2, 64, 16))
    near = paged_attention(make_call(*CASES["long"], 14, 2, 64, 16, kv_dtype=kv_dtype))
    assert (near - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize(("dtype", "kv_dtype"), [(torch.float32, None), (torch.float32, torch.int8), (torch.bfloat16, None)])
@pytest.mark.parametrize(
    "extras",
    [
        {"soft_cap": 1.5},
        {"sinks": torch.tensor([0.5, -3.0, 20.0, 0.0, 4.0, 1.0])},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0, 1.0, 0.01])},
        {"soft_cap": 2.0, "sinks": torch.ones(6), "alibi_slopes": torch.full((6,), 0.1), "window": 9},
    ],
    ids=lambda extras: " ".join(extras),
)
@pytest.mark.parametrize("case", CASES)
def test_what_models_do_to_scores(case, extras, dtype, kv_dtype):
    call = make_call(*CASES[case], 6, 2, 20, 3, dtype, kv_dtype, **extras)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(paged_attention(call), reference.paged_attention(call), rtol=tolerance, atol=tolerance)


def test_the_reference_by_hand():
    """Two positions, one head: the words of AttentionCall as arithmetic."""
    call = make_call([2], [1], 1, 1, 2, 4, soft_cap=3.0, sinks=torch.tensor([0.7]), alibi_slopes=torch.tensor([0.25]))
    keys, values = (side[:, 0].double() for side in reference.gather(call.kv, call.block_table[call.rows[0]], 2))
    raw = [3 * math.tanh(float(call.q[0, 0].double() @ key) * 2**-0.5 / 3) for key in keys]
    weights = [math.exp(raw[0] - 0.25), math.exp(raw[1])]
    expected = sum(weight * value for weight, value in zip(weights, values, strict=True)) / (sum(weights) + math.exp(0.7))
    torch.testing.assert_close(reference.paged_attention(call)[0, 0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", [None, *EIGHT_BITS])
@pytest.mark.parametrize("heads", [(6, 2, 20), (14, 2, 64)], ids=str)
def test_a_row_does_not_depend_on_its_batch_nor_on_chunks(heads, kv_dtype, dtype):
    """Bit for bit: tiles start at fixed positions, whatever was computed in earlier steps."""
    if native.library() is None:
        pytest.skip("no compiler")
    both = make_call([300, 70], [300, 70], *heads, 16, dtype, kv_dtype)
    together = paged_attention(both)
    for start, end in ((0, 300), (0, 7), (7, 150), (150, 299), (299, 300), (64, 65)):
        bounds, length = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        alone = both._replace(q=both.q[start:end], rows=both.rows[:1], query_start=bounds, seq_lens=length)
        assert torch.equal(paged_attention(alone), together[start:end])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_a_decode_is_shared_out_whole(kv_dtype, threads):
    """Each row as if it were alone, however many there are, however long, and whoever works on it."""
    if native.library() is None:
        pytest.skip("no compiler")
    lengths = [1, 2500, 17, 64, 1024, 1025, 3, 200, 65]
    call = make_call(lengths, [1] * 9, 14, 2, 64, 16, torch.bfloat16, kv_dtype)
    before = native.num_threads()
    native.set_num_threads(threads)
    try:
        together = paged_attention(call)
    finally:
        native.set_num_threads(before)
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    for row in range(9):
        here = slice(row, row + 1)
        alone = call._replace(q=call.q[here], rows=call.rows[here], query_start=bounds, seq_lens=call.seq_lens[here])
        assert torch.equal(paged_attention(alone), together[here])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_left_the_window_is_not_read(dtype):
    """Its blocks may hold another sequence's by now, and be it broken."""
    if native.library() is None:
        pytest.skip("no compiler")
    call = make_call([300], [1], 14, 2, 64, 16, dtype, window=20)
    expected = paged_attention(call)
    call.kv[call.block_table[call.rows[0], :17].long()] = float("nan")
    call.kv[call.block_table[call.rows[0], 17].long(), :, :8] = float("nan")
    assert torch.equal(paged_attention(call), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_key_breaks_its_row_alone(dtype):
    call = make_call([70, 70], [1, 1], 14, 2, 64, 16, dtype)
    expected = paged_attention(call)
    call.kv[call.block_table[call.rows[0], 2].long(), 0, 3, 1, 5] = float("nan")
    broken = paged_attention(call)
    assert broken[0, 7:].isnan().all()
    assert torch.equal(broken[0, :7], expected[0, :7])
    assert torch.equal(broken[1], expected[1])


def test_what_does_not_fit_is_told():
    call = make_call([3], [3], 6, 2, 20, 16)
    for wrong, words in (
        ({"q": call.q[:, :5]}, "does not fit a cache"),
        ({"kv": call.kv.to(torch.int8)}, "needs its scales"),
        ({"sinks": torch.zeros(5)}, r"sinks must be \[6\] float32, got \(5,\)"),
        ({"alibi_slopes": torch.zeros(6, dtype=torch.bfloat16)}, r"alibi_slopes must be .*bfloat16"),
        ({"soft_cap": 0.0}, "soft_cap must be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            paged_attention(call._replace(**wrong))
