"""Tests and benchmarks of a GPU host, from a checkout: one command, no network, one JSON and one table.

    python3 benchmarks/gpu/run.py [--wheels FOLDER] [--output FOLDER] [--budget 520] [--only PART …] [--quick]

Needs Python with torch and triton; what else is missing is taken from wheels in a folder. Every part has a process of its
own and a limit; a crash loses one case, and the next process goes on behind it. Parts that the budget has no room for are
dropped and said to be. `--dry-run-cpu` runs all of it with tiny shapes on a CPU, to see that the command itself works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.gpu import table
from benchmarks.gpu.host import ROOT, prepare
from benchmarks.gpu.parts import PARTS, Part

_GRACE_S = 5.0  # to write what was found


class Run:
    """One run of the command."""

    def __init__(self, given: argparse.Namespace, environment: dict[str, str]) -> None:
        self._given, self._environment = given, environment
        self._end_s = time.monotonic() + given.budget - _GRACE_S
        self._ceilings: dict[str, float] = {}
        self.results: list[dict[str, Any]] = []

    def part(self, part: Part) -> None:
        """Run a part's cases, again behind each one that broke the process."""
        start = time.monotonic()
        done: list[str] = []
        limit = start + part.limit_s
        while True:
            left = min(limit, self._end_s) - time.monotonic()
            if left < (part.least_s if not done else 2.0) and not self._given.dry_run_cpu:
                self._add(part, {"case": "the rest" if done else "all", "dropped": f"{max(0.0, left):.0f} s were left"})
                break
            lines, ended = self._process(part, done, max(left, 2.0))
            finished = _finished(lines, ended)
            for line in finished:
                self._add(part, line)
            done += [line["case"] for line in finished]
            if ended is None:
                break
            if not finished:
                self._add(part, {"case": "all", "error": ended})
                break
        print(f"{part.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)

    def _process(self, part: Part, done: list[str], seconds: float) -> tuple[list[dict[str, Any]], str | None]:
        """What a worker wrote, and why it ended if not by itself."""
        with tempfile.TemporaryDirectory(dir=self._given.output) as scratch:
            file = Path(scratch) / "cases.jsonl"
            command = [
                sys.executable, "-m", "benchmarks.gpu.worker", part.module, "--output", str(file), "--model", part.model,
                "--ceilings", json.dumps(self._ceilings), "--done", json.dumps(done),
            ]  # fmt: skip
            command += ["--device", "cpu", "--tiny"] if self._given.dry_run_cpu else []
            ended = None
            try:
                process = subprocess.run(
                    command, cwd=ROOT, env=self._environment, timeout=seconds, capture_output=True, text=True, check=False
                )
                if process.returncode:
                    ended = f"the process ended with {process.returncode}: {process.stderr[-1500:]}"
            except subprocess.TimeoutExpired:
                ended = f"not done after {seconds:.0f} s"
            for left in Path(scratch).glob("trace*"):
                left.replace(self._given.output / left.name)
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            return [json.loads(line) for line in text.splitlines() if line.endswith("}")], ended

    def _add(self, part: Part, line: dict[str, Any]) -> None:
        self.results.append({"part": part.name, **line})
        figures = line.get("figures", {})
        self._ceilings |= {name: figures[name] for name in ("copy_gb_s", "matmul_tflop_s") if name in figures}


def _finished(lines: list[dict[str, Any]], ended: str | None) -> list[dict[str, Any]]:
    """Cases that have a result; for the one that was at work when the process ended that is its end."""
    finished = [line for line in lines if len(line) > 1]
    names = {line["case"] for line in finished}
    broken = [line["case"] for line in lines if line["case"] not in names]
    return finished + [{"case": case, "error": ended or "the process ended"} for case in broken]


def chosen(given: argparse.Namespace) -> list[Part]:
    """The parts that are wanted; ceilings always, as shares are of them."""
    parts = [part for part in PARTS if part.quick or not given.quick]
    if given.only:
        parts = [part for part in PARTS if any(part.name.startswith(name) for name in ("ceilings", *given.only))]
    return parts


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with 2 for an unknown part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels, for what the host lacks")
    parser.add_argument("--output", type=Path, default=Path("gpu-benchmark"), help="folder for gpu.json, gpu.md, traces")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="beginnings of parts' names")
    parser.add_argument("--quick", action="store_true", help="the most telling parts alone")
    parser.add_argument("--dry-run-cpu", action="store_true", help="tiny shapes on a CPU")
    given = parser.parse_args(arguments)
    names = ", ".join(part.name for part in PARTS)
    for name in given.only:
        if not any(part.name.startswith(name) for part in PARTS):
            parser.error(f"no part begins with {name!r}; there are: {names}")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 if anything failed."""
    given = parse(arguments)
    start = time.monotonic()
    given.output.mkdir(parents=True, exist_ok=True)
    environment, unpacked = prepare(given.output / "site", given.wheels)
    run = Run(given, environment)
    for part in chosen(given):
        run.part(part)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv, "commit": _commit(),
        "wheels": unpacked, "s": round(time.monotonic() - start, 1), "results": run.results,
    }  # fmt: skip
    (given.output / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = table.render(run.results)
    (given.output / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any("error" in line for line in run.results))


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
