"""The Triton kernels of attention and of one token each without a GPU: numbers by the interpreter, code by the compilers.

In processes of their own: Triton reads its environment when it is imported, and an interpreter's process cannot compile.
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


def test_all_compile_for_gpus_within_shared_memory_and_registers():
    found = run_script("attention_compiled.py", TRITON_INTERPRET="0")
    assert set(found) == {"sm_80", "sm_90", "gfx942"}
    for target, kernels in found.items():
        assert len(kernels) >= 9
        assert not {name: trouble for name, trouble in kernels.items() if trouble}, target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(3, 6, 20, dtype=torch.float64)}, "must be float32, float16 or bfloat16, got torch.float64"),
        ({"q": torch.zeros(3, 6, 20).transpose(0, 1).contiguous().transpose(0, 1)}, "heads must be dense"),
        ({"rows": torch.tensor([0, 1])}, "2 rows, but 2 starts and 1 lengths"),
    ],
)
def test_what_the_kernels_do_not_serve_is_told_before_a_launch(change, words):
    kernels = pytest.importorskip("llmd_kernels.paged_attention.triton")
    with pytest.raises(ValueError, match=words):
        kernels.paged_attention(make_call([3], [3], 6, 2, 20, 16)._replace(**change))
    with pytest.raises(ValueError, match="head_dim must be at most 256, got 257"):
        kernels.paged_attention(make_call([3], [3], 1, 1, 257, 16))


def test_splits_fill_a_device_and_never_depend_on_lengths():
    assert [table.num_splits(programs, 132) for programs in (1, 8, 64, 256, 4096)] == [32, 32, 4, 1, 1]
    assert table.num_splits(1, 1) == 2
    for device in ("sm_80", "sm_90", "gfx942", "sm_120", "gfx1100"):
        for dim in (16, 64, 128, 256):
            for is_prefill in (False, True):
                tiles = table.tiles(device, dim, is_prefill=is_prefill)
                assert all(size & (size - 1) == 0 for size in tiles[:3])


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
    for heads, given in (((14, 2, 64, 16), {}), ((14, 2, 80, 16), extras)):
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
