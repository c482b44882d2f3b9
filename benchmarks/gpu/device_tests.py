"""The tests of kernels on the device itself, beside those that need none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.host import ROOT
from benchmarks.gpu.setting import Setting

FILES = (
    "kernels/test_triton.py",
    "kernels/test_step_kernels.py",
    "kernels/test_quantized_triton.py",
    "kernels/test_lora.py",
    "model/test_triton_sampler.py",
)
TINY = ("test_sentence_files.py",)


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """One for each module of tests."""
    return {name: lambda name=name: run(name) for name in (TINY if setting.is_tiny else FILES)}  # type: ignore[misc]


def run(name: str) -> dict[str, Any]:
    """What pytest says of a module. Raises RuntimeError with the end of its output if a test failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    if done.returncode:
        raise RuntimeError(f"{counts or 'no tests'}: {(done.stdout + done.stderr)[-1500:]}")
    return counts
