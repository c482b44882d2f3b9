"""The tests that need a GPU, on the device itself, by several processes: compiling takes most of their time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.host import ROOT
from benchmarks.gpu.setting import Setting

_LIMIT_S = 100.0  # below the part's for a case, so that what is known by then is not lost
_TEST_S = 60
_PROCESSES = 8
_WORDS = "PASSED|FAILED|ERROR|SKIPPED"
_OF_SEVERAL = re.compile(rf"\] ({_WORDS}) (tests/.+?)\s*$")  # [gw0] [ 10%] PASSED name
_OF_ONE = re.compile(rf"^(tests/.+?) ({_WORDS})\b")  # name PASSED [ 10%]
_AT_THE_END = re.compile(r"^(FAILED|ERROR) (tests/.+?)(?: - .*)?$")


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """One for all of them."""
    return {"all": lambda: run(setting, [ROOT / "tests" / "test_sentence_files.py"] if setting.is_tiny else marked())}


def marked(tests: Path = ROOT / "tests") -> list[Path]:
    """The modules that hold such tests; the others may want packages that a bare host lacks."""
    words = ("mark.gpu", "mark.skipif(not torch.cuda.is_available()")
    found = [path for path in tests.rglob("test_*.py") if any(word in path.read_text(encoding="utf-8") for word in words)]
    return sorted({*found, *(tests / "gpu").glob("test_*.py")})


def command(files: list[Path], *, is_gpu: bool) -> list[str]:
    """Pytest with the host's own packages: settings of plugins that it lacks are left out, and warnings are no errors."""
    given = [
        sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=",
        "-o", "filterwarnings=default", "--import-mode=importlib", "--continue-on-collection-errors",
    ]  # fmt: skip
    given += ["-m", "gpu"] if is_gpu else []
    if find_spec("pytest_timeout") is not None:
        given += ["-o", f"timeout={_TEST_S}"]
    if is_gpu and find_spec("xdist") is not None:
        given += ["-n", str(_PROCESSES), "--dist", "worksteal"]
    return [*given, *(str(file.relative_to(ROOT)) for file in files)]


def run(setting: Setting, files: list[Path]) -> dict[str, Any]:
    """How many passed, failed and were skipped. Raises RuntimeError where not one was run."""
    start, log = time.monotonic(), setting.folder / "kept" / "tests.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            command(files, is_gpu=not setting.is_tiny), cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=os.environ
        )
        timer = threading.Timer(_LIMIT_S, process.kill)
        timer.start()
        process.wait()
        timer.cancel()
    text = log.read_text(encoding="utf-8", errors="replace")
    outcomes = outcome_of_each(text)
    counts = Counter(outcomes.values())
    if not counts["PASSED"] and not counts["FAILED"]:
        raise RuntimeError(f"no test was run: {text[-1500:]}")
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    return {
        "passed": counts["PASSED"], "failed": len(failed), "skipped": counts["SKIPPED"],
        "unfinished": int(process.returncode < 0), "s": round(time.monotonic() - start, 1),
        "first": "; ".join(name.rpartition("/")[2] for name in failed[:8]) or None,
    }  # fmt: skip


def outcome_of_each(text: str) -> dict[str, str]:
    """By the test's name, from what `pytest -v` says, with several processes or without."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := _OF_SEVERAL.search(line) or _AT_THE_END.search(line):
            found[match[2]] = match[1]
        elif match := _OF_ONE.search(line):
            found[match[1]] = match[2]
    return found
