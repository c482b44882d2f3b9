"""The quantized products' GPU kernels without a GPU: right in the interpreter, and compiled without spilling."""

import pytest
from kernels.test_lora import run_script


def test_in_the_interpreter():
    for case, error in run_script("quantized_interpreted.py", TRITON_INTERPRET="1").items():
        assert error < (2e-3 if "float16" in case else 1e-5), case


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled(target):
    for case, problem in run_script("quantized_compiled.py", TRITON_INTERPRET="0", LLMD_TEST_TARGET=target).items():
        assert problem is None, f"{case}: {problem}"
