"""The Triton kernels of attention and of one token each: numbers by the interpreter or on a GPU; what they do not serve.

In processes of their own: Triton reads its environment when it is imported. Their machine code: test_machine_code.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.attention_calls import make_call

from llmd_kernels.paged_attention import paged_attention, reference, table
from llmd_kernels.quantized_kv import QuantizedKV

TESTS = Path(__file__).parent.parent


def run_script(name, **environment):
    """What a script beside this file prints."""
    pytest.importorskip("triton")
    source = (TESTS / "kernels" / name).read_text()
    env = {**os.environ, "PYTHONPATH": str(TESTS), **environment}
    command = [sys.executable, "-W", "ignore", "-c", source]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_attention_in_the_interpreter():
    errors = run_script("attention_interpreted.py", TRITON_INTERPRET="1")
    assert len(errors) > 15
    for case, error in errors.items():
        is_half = "half" in case or "another dtype" in case
        assert error < (2e-3 if is_half else 2e-6), case


def test_kernels_of_one_token_in_the_interpreter():
    errors = run_script("elementwise_interpreted.py", TRITON_INTERPRET="1")
    assert len(errors) > 20
    for case, error in errors.items():
        assert error < (2e-3 if case.endswith("float16") else 2e-6), case


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(3, 6, 20, dtype=torch.float64)}, "must be float32, float16 or bfloat16, got torch.float64"),
        ({"q": torch.zeros(3, 6, 20).transpose(0, 1).contiguous().transpose(0, 1)}, "heads must be dense"),
        ({"rows": torch.tensor([0, 1])}, "2 rows, but 2 starts and 1 lengths"),
        ({"scale": 0.0}, "scale must be above 0, got 0.0"),
        ({"block_table": torch.zeros(4, 9, dtype=torch.int32).T}, "lines of block_table must be dense"),
        ({"kv": torch.zeros(3, 1, 16, 2, 20)}, "a cache .blocks, 2, tokens, K, D."),
    ],
)
def test_what_the_kernels_do_not_serve_is_told_before_a_launch(change, words):
    kernels = pytest.importorskip("llmd_kernels.paged_attention.triton")
    with pytest.raises(ValueError, match=words):
        kernels.paged_attention(make_call([3], [3], 6, 2, 20, 16)._replace(**change))
    with pytest.raises(ValueError, match="head_dim must be at most 256, got 257"):
        kernels.paged_attention(make_call([3], [3], 1, 1, 257, 16))


def test_rows_past_the_counters_are_told():
    kernels = pytest.importorskip("llmd_kernels.paged_attention.triton")
    call, many = make_call([3], [1], 6, 2, 20, 16), 1 << 15
    columns = {"rows": torch.zeros(many + 1), "query_start": torch.zeros(many + 2), "seq_lens": torch.zeros(many + 1)}
    with pytest.raises(ValueError, match="at most 65536 rows times KV heads, got 32769 times 2"):
        kernels.check(call._replace(**columns))


BAD = {
    "rms_norm": [
        (lambda k: k.rms_norm(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3), 1e-6), "wants float32, float16 or b"),
        (lambda k: k.rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-6), "wants a dense weight .3., got .4,."),
        (lambda k: k.rms_norm(torch.zeros(3, 2).T, torch.zeros(3), 1e-6), "with a dense last dim"),
        (lambda k: k.rms_norm(torch.zeros(1, (1 << 15) + 1), torch.zeros((1 << 15) + 1), 1e-6), "at most 32768 numbers"),
        (lambda k: k.add_rms_norm(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3), 1e-6), "a residual of .2, 3."),
        (lambda k: k.add_rms_norm(torch.zeros(2, 3), torch.zeros(3, 2).T, torch.zeros(3), 1e-6), "contiguous .T, D."),
    ],
    "silu_mul": [
        (lambda k: k.activate(torch.zeros(2, 5), 0), "wants contiguous .T, 2.D."),
        (lambda k: k.activate(torch.zeros(2, 4, dtype=torch.int8), 0), "got torch.int8"),
    ],
    "embedding": [
        (lambda k: k.embedding(torch.zeros(2), torch.zeros(2, 4)), "int32 or int64 ids, got torch.float32"),
        (lambda k: k.embedding(torch.zeros(2, dtype=torch.int64), torch.zeros(4, 2).T), "dense rows"),
    ],
    "rotary": [
        (
            lambda k: k.rotary(*torch.zeros(2, 3, 2, 4), torch.zeros(3), torch.zeros(9, 3)),
            "must be even and at most 4, got 3",
        ),
        (lambda k: k.rotary(torch.zeros(3, 2, 4), torch.zeros(3, 2, 4).half(), None, torch.zeros(9, 4)), "torch.float16"),
    ],
    "store_kv": [
        (lambda k: store(k, q=torch.zeros(3, 2, 8)[..., ::2]), "heads of q must be dense"),
        (lambda k: store(k, v=torch.zeros(3, 2, 4, dtype=torch.float64)), "v must be float32, float16 or bfloat16"),
        (lambda k: store(k, kv=torch.zeros(3, 2, 16, 2, 8)[..., ::2]), "heads of the cache must be dense"),
        (lambda k: store(k, slots=torch.zeros(2, dtype=torch.int64)), "3 tokens, but 2 slots and 3 positions"),
        (lambda k: store(k, cos_sin=torch.zeros(9, 6)), "must be even and at most 4, got 6"),
    ],
}


def store(kernels, **other):
    """rotary_store_kv of three tokens of two heads of four dims."""
    heads, slots = torch.zeros(3, 2, 4), torch.zeros(3, dtype=torch.int64)
    given = {"q": heads, "k": heads, "v": heads, "kv": torch.zeros(3, 2, 16, 2, 4), "positions": slots, "slots": slots}
    kernels.rotary_store_kv(*{**given, "cos_sin": torch.zeros(9, 4), **other}.values())


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, cases in BAD.items() for at in range(len(cases))])
def test_what_kernels_of_one_token_do_not_serve_is_told_before_a_launch(name, at):
    kernels = pytest.importorskip(f"llmd_kernels.{name}.triton")
    wrong, words = BAD[name][at]
    with pytest.raises(ValueError, match=words):
        wrong(kernels)


def test_programs_fill_a_device_and_never_depend_on_lengths():
    for device in ("sm_80", "sm_90", "gfx942", "sm_120", "gfx1100"):
        for dim in (16, 64, 128, 256):
            for is_prefill in (False, True):
                tiles = table.tiles(device, dim, is_prefill=is_prefill)
                assert all(size & (size - 1) == 0 for size in tiles[:3])
                assert 1 <= tiles.programs <= 8
    tile = table.Tiles(16, 64, 4, 5, 3)
    for group, are_columns, expected in ((7, False, (16, 3)), (7, True, (8, 3)), (16, False, (16, 3)), (40, False, (64, 2))):
        fitting = table.fitted(tile, group, heads_are_columns=are_columns)
        assert (fitting.block_m, fitting.programs) == expected
    assert table.fitted(table.Tiles(128, 64, 8, 5), 4, is_wide=True) == (64, 32, 8, 5, 1)
    assert [table.registers(tile._replace(programs=count)) for count in (1, 2, 3, 4)] == [255, 255, 168, 128]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ROWS = {"decode": ([5, 1300, 77, 1], [1, 1, 1, 1]), "mixed": ([5, 1500, 77, 9], [5, 1, 70, 1])}


def on_gpu(call):
    """The same call with all its tensors on the device."""

    def move(value):
        if isinstance(value, QuantizedKV):
            return QuantizedKV(*(tensor.cuda() for tensor in value))
        return value.cuda() if isinstance(value, torch.Tensor) else value

    return type(call)(*map(move, call))


@GPU
@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", ROWS)
def test_attention_on_a_gpu(rows, dtype, kv_dtype):
    extras = {"soft_cap": 5.0, "sinks": torch.arange(14) - 7.0, "alibi_slopes": torch.full((14,), 0.01), "window": 600}
    for heads, given in (((14, 2, 64, 16), {}), ((14, 2, 80, 16), extras), ((40, 1, 128, 16), {}), ((8, 8, 256, 16), {})):
        call = make_call(*ROWS[rows], *heads, dtype, kv_dtype, **given)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        actual = paged_attention(on_gpu(call)).cpu()
        torch.testing.assert_close(actual, reference.paged_attention(call), rtol=tolerance, atol=tolerance)


@GPU
def test_a_captured_graph_serves_any_lengths():
    call = on_gpu(make_call(*ROWS["decode"], 14, 2, 64, 16, torch.bfloat16))
    paged_attention(call)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(call)
    for lengths in ([5, 1300, 77, 1], [2, 40, 9, 1], [4, 1024, 64, 1]):
        call.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.testing.assert_close(out, reference.paged_attention(call), rtol=2e-2, atol=2e-2)
