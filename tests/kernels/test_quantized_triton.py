"""The quantized products' GPU kernels without a GPU: right in the interpreter, and compiled without spilling."""

import itertools

import numpy as np
import pytest
import torch
from kernels.test_lora import run_script

from kernels import ptx


def test_in_the_interpreter():
    for case, error in run_script("quantized_interpreted.py", TRITON_INTERPRET="1").items():
        assert error < (2e-3 if "float16" in case else 1e-5), case


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled(target):
    for case, problem in run_script("quantized_compiled.py", TRITON_INTERPRET="0", LLMD_TEST_TARGET=target).items():
        assert not problem, f"{case}: {problem}"


EVERY = np.arange(256, dtype=np.uint32)
WORDS = EVERY | np.roll(EVERY, 7) << 8 | np.roll(EVERY, 91) << 16 | np.roll(EVERY, 200) << 24


@pytest.mark.parametrize("is_bf16", [False, True])
def test_the_ptx_that_widens_bytes_gives_their_values(is_bf16):
    kernels = pytest.importorskip("llmd_kernels.fp8_linear.triton")
    pairs = ptx.run(kernels.widening(is_bf16), [WORDS], 2)
    for place in range(4):
        found = ptx.floats(pairs[place // 2] >> np.uint32(16 * (place % 2)) & 0xFFFF, is_bf16)
        byte = (WORDS >> np.uint32(8 * place) & 0xFF).astype(np.uint8)
        expected = torch.from_numpy(byte).view(torch.float8_e4m3fn).float().numpy()
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize(("is_bf16", "dtype"), [(False, torch.float16), (True, torch.bfloat16)])
def test_the_ptx_that_widens_halves_of_bytes_gives_their_values_and_more(is_bf16, dtype):
    kernels = pytest.importorskip("llmd_kernels.grouped_linear.triton")
    pairs = ptx.run(kernels.widening(is_bf16), [WORDS], 4)
    for place, half in itertools.product(range(4), range(2)):
        found = ptx.floats(pairs[2 * half + place // 2] >> np.uint32(16 * (place % 2)) & 0xFFFF, is_bf16)
        byte = WORDS >> np.uint32(8 * place)
        np.testing.assert_array_equal(found, (byte >> np.uint32(4 * half) & 15) + kernels.LIFTS[dtype])
