"""Tests and benchmarks of a GPU host, from a checkout: one command, no network, one JSON and one table.

    python3 benchmarks/gpu/run.py [--wheels FOLDER] [--output FOLDER] [--budget 520] [--only PART …] [--quick]

Needs Python with torch and triton; what else is missing is taken from wheels in a folder. Every part has a process of its
own and a limit, every case a time by which it must be done; a crash or a hang loses one case, and the next process goes on
behind it. Parts that the budget has no room for are dropped and said to be. Each result is written as it is found, so that
a run that is killed has lost nothing. `--dry-run-cpu` runs all of it with tiny shapes on a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.gpu import table
from benchmarks.gpu.host import ROOT, prepare
from benchmarks.gpu.parts import PARTS, Part

_GRACE_S = 8.0  # to write what was found
_STARTING_S = 45.0  # to import torch and make a context, before the first case
_GLANCE_S = 0.1
KEPT = "kept"  # the folder in a worker's own whose files come along


class Run:
    """One run of the command."""

    def __init__(self, given: argparse.Namespace, environment: dict[str, str]) -> None:
        self._given, self._environment = given, environment
        self._start_s = time.monotonic()
        self._end_s = self._start_s + given.budget - _GRACE_S
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
            self._add_new(part, finished)
            done += [line["case"] for line in finished]
            if ended is None:
                break
            if not finished:
                self._add(part, {"case": "all", "error": ended})
                break
        print(f"{part.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    def _process(self, part: Part, done: list[str], seconds: float) -> tuple[list[dict[str, Any]], str | None]:
        """What a worker wrote, and why it ended if not by itself."""
        with tempfile.TemporaryDirectory(prefix="llmd-gpu-", ignore_cleanup_errors=True) as scratch:
            file, log = Path(scratch) / "cases.jsonl", Path(scratch) / "log"
            command = [
                sys.executable, "-m", "benchmarks.gpu.worker", part.module, "--output", str(file), "--model", part.model,
                "--ceilings", json.dumps(self._ceilings), "--done", json.dumps(done),
            ]  # fmt: skip
            command += ["--device", "cpu", "--tiny"] if self._given.dry_run_cpu else []
            with log.open("wb") as said:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=self._environment, stdout=said, stderr=said, process_group=0
                )
                try:
                    why = _watch(process, file, seconds, part.case_s, lambda lines: self._add_new(part, lines))
                finally:
                    end(process)
            if why is None and process.returncode:
                why = f"the process ended with {process.returncode}: {_end_of(log)}"
            self._keep(Path(scratch) / KEPT)
            return _lines(file), why

    def _keep(self, folder: Path) -> None:
        """What cases left for the reader."""
        for file in folder.iterdir() if folder.is_dir() else ():
            (self._given.output / file.name).write_bytes(file.read_bytes())

    def _add_new(self, part: Part, lines: list[dict[str, Any]]) -> None:
        """Those that have a result and were not added before."""
        known = {line["case"] for line in self.results if line["part"] == part.name}
        for line in lines:
            if len(line) > 1 and line["case"] not in known:
                self._add(part, line)

    def _add(self, part: Part, line: dict[str, Any]) -> None:
        line = {"part": part.name, **line}
        self.results.append(line)
        with (self._given.output / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{time.monotonic() - self._start_s:5.0f} s {part.name}, {line['case']}: {table.found(line)}", flush=True)
        figures = line.get("figures", {})
        self._ceilings |= {name: figures[name] for name in ("copy_gb_s", "matmul_tflop_s") if name in figures}


def _watch(
    process: subprocess.Popen[bytes],
    file: Path,
    seconds: float,
    case_s: float,
    news: Callable[[list[dict[str, Any]]], None] = lambda lines: None,
) -> str | None:
    """Wait for a worker, telling what it writes; kill it, and say why, where it or one of its cases takes too long."""
    end_s, num_lines, begun_s = time.monotonic() + seconds, 0, time.monotonic()
    allowed = max(case_s, _STARTING_S)
    while process.poll() is None:
        now_s = time.monotonic()
        if len(lines := _lines(file)) != num_lines:
            num_lines, begun_s, allowed = len(lines), now_s, case_s
            news(lines)
        if now_s > end_s or now_s - begun_s > allowed:
            end(process)
            return f"not done after {now_s - begun_s:.0f} s" if now_s <= end_s else f"the part's {seconds:.0f} s were over"
        time.sleep(_GLANCE_S)
    return None


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and whatever it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _lines(file: Path) -> list[dict[str, Any]]:
    """What is whole of it: the last line may be cut."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1500:]


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
    parser.add_argument("--output", type=Path, default=Path("gpu-benchmark"), help="folder for the results")
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
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "gpu.jsonl").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="llmd-site-", ignore_cleanup_errors=True) as site:
        environment, unpacked = prepare(Path(site), given.wheels)
        run = Run(given, environment)
        for part in chosen(given):
            run.part(part)
            _write(given.output, run, unpacked)
    print("\n" + table.figures(run.results))
    return int(any("error" in line for line in run.results))


def _write(output: Path, run: Run, unpacked: list[str]) -> None:
    """All that is known by now."""
    known = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv, "commit": _commit(),
        "wheels": unpacked, "s": round(time.monotonic() - run._start_s, 1), "results": run.results,
    }  # fmt: skip
    (output / "gpu.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    (output / "gpu.md").write_text(table.render(run.results), encoding="utf-8")


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
