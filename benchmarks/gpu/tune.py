"""Measures the tiles of kernels on this device and writes the quickest into their decision tables.

    python3 benchmarks/gpu/tune.py [--wheels FOLDER] [--only TABLE …] [--dry-run] [--budget 480] [--output FOLDER] [--resume]

A search: every tile that differs from the present one in a field is compiled, by many processes at once, and timed; the
quickest takes its place, until none is quicker by more than the noise. Each decision is written at once, into the table's
file and as `tune.patch` into the output folder; `tune.jsonl` there holds all times, and `--resume` goes on from it. A tile
that breaks the process or hangs is never tried again. `--dry-run` changes no table; without a GPU it tells what there is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.gpu.host import ROOT, prepare
from benchmarks.gpu.run import end

_TILE_S = 30.0  # a tile that takes longer to compile and to time hangs
_GLANCE_S = 0.2
ORDER = (
    "paged_attention", "linear", "grouped_linear", "fp8_linear", "experts", "int8_linear", "sampling", "lora",
)  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER, metavar="TABLE")
    parser.add_argument("--dry-run", action="store_true", help="show, write no table")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, for what the host lacks")
    parser.add_argument("--output", type=Path, default=Path("gpu-tuning"), help="folder for times and the patch")
    parser.add_argument("--resume", action="store_true", help="take the times that lie there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Tune the chosen tables in processes that may break; 1 if none could."""
    given = parse(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    times = given.output / "tune.jsonl"
    if not given.resume:
        times.unlink(missing_ok=True)
    end_s = time.monotonic() + given.budget
    with tempfile.TemporaryDirectory(prefix="llmd-site-", ignore_cleanup_errors=True) as site:
        environment, _ = prepare(Path(site), given.wheels)
        while (left := end_s - time.monotonic()) > 5:
            command = [sys.executable, "-m", "benchmarks.gpu.tuning", "--output", str(given.output), "--budget", str(left)]
            command += ["--only", *given.only, *(["--dry-run"] if given.dry_run else [])]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0)
            try:
                code = watch(process, times, left + 10)
            finally:
                end(process)
            if code == 0:
                return 0
            if not give_up_last(times):
                return 1
    return 0


def watch(process: subprocess.Popen[bytes], times: Path, seconds: float) -> int:
    """The exit code of a process that tunes; it is killed where it takes too long over a tile, or over all."""
    end_s, size, moved_s = time.monotonic() + seconds, -1, time.monotonic()
    while process.poll() is None:
        now_s = time.monotonic()
        if (grown := times.stat().st_size if times.exists() else 0) != size:
            size, moved_s = grown, now_s
        if now_s > end_s or now_s - moved_s > 2 * _TILE_S:
            end(process)
            break
        time.sleep(_GLANCE_S)
    return int(process.wait())


def give_up_last(times: Path) -> bool:
    """Write down that the tile which was at work does not run; False where none was."""
    lines = [json.loads(line) for line in _text(times).splitlines(keepends=True) if line.endswith("}\n")]
    if not lines or "ms" in lines[-1]:
        return False
    begun: dict[str, Any] = lines[-1]
    with times.open("a", encoding="utf-8") as file:
        file.write(json.dumps(begun | {"ms": None, "why": "it broke the process, or took too long"}) + "\n")
    return True


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


if __name__ == "__main__":
    raise SystemExit(main())
