"""The kernels built for processors without AVX-512, or without its products: the same sources, the same answers.

Each build is a process of its own, which runs a few of every op's tests: what a processor cannot do would end it there.
Compiling takes most of the time, so two of the three builds are made with `pytest -m older` only.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from llmd_kernels import native

HERE = Path(__file__).parent
NOT_OF_OPS = {"test_native", "test_older_processors", "test_triton", "test_quantized_triton"}
BUILDS = {
    "x86-64": ("sse2", "-march=x86-64 -mtune=generic"),
    "x86-64-v3": ("avx2", "-march=x86-64-v3"),
    "without-products": ("avx512f", "-mno-avx512bf16 -mno-avx512vnni"),
}


@pytest.mark.parametrize(
    "build", [pytest.param(name, marks=() if name == "x86-64-v3" else pytest.mark.older) for name in BUILDS]
)
def test_every_op_gives_the_same_answers(build, tmp_path):
    feature, flags = BUILDS[build]
    if native.library() is None or platform.machine() != "x86_64" or feature not in native._cpu():
        pytest.skip("no compiler, or another processor")
    environment = {
        **os.environ, "LLMD_KERNEL_FLAGS": f"{flags} -O1 -Wno-psabi", "LLMD_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    modules = [str(path) for path in sorted(HERE.glob("test_*.py")) if path.stem not in NOT_OF_OPS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "kernels.older_sample", *modules]
    done = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1
