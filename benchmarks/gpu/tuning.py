"""The process that tunes: reads the times that are known, measures what is not, and writes each decision at once."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.host import ROOT
from benchmarks.gpu.tables import replaced
from benchmarks.gpu.tuned import TARGETS, Target

_NOISE = 0.03
_ROUNDS = 4  # of a search from a tile to a neighbour
_SHARE = 0.5  # of the time that is left, for a table
_PROCESSES = 10  # that compile
_COMPILE_S = 60.0

Measure = Callable[[Any, Any], float]  # an entry's key and a tile → milliseconds; inf where the tile does not run
Prepare = Callable[[Any, Sequence[Any]], None]  # compile tiles of an entry


def tune(
    target: Target,
    measure: Measure,
    is_over: Callable[[], bool] = lambda: False,
    prepare: Prepare = lambda key, tiles: None,
    decided: Callable[[], None] = lambda: None,
) -> list[str]:
    """What changed, in words; the target's table holds the result. `decided` is called behind each change."""
    changes = []
    for key, present in target.entries().items():
        if is_over():
            changes.append(f"{target.name}: the rest was not tried, the budget was spent")
            break
        best, times = _search(target, key, present, measure, prepare, is_over)
        if best != present:
            changes.append(f"{target.name} {key}: {present} {times[present]:.4f} ms -> {best} {times[best]:.4f} ms")
            target.set(key, best)
            decided()
    return changes


def _search(
    target: Target, key: Any, present: Any, measure: Measure, prepare: Prepare, is_over: Callable[[], bool]
) -> tuple[Any, dict[Any, float]]:
    """The quickest tile on a way of neighbours, and the times of all that were tried."""
    best, times = present, {}
    for _ in range(_ROUNDS):
        wanted = [tile for tile in dict.fromkeys((best, *target.candidates(key, best))) if tile not in times]
        prepare(key, wanted)
        for tile in wanted:
            if is_over() and tile != present:
                break
            times[tile] = measure(key, tile)
        found = min(times, key=times.__getitem__)
        if not times[found] < times[best] * (1 - _NOISE):
            break
        best = found
    return best, times


class Times:
    """What was measured, in a file that a broken process leaves behind."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[tuple[str, str, str], float] = {}
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("}\n") and "ms" in (found := json.loads(line)):
                ms = found["ms"]
                self._known[found["table"], found["entry"], found["tile"]] = math.inf if ms is None else ms

    def knows(self, target: Target, key: Any, tile: Any) -> bool:
        """Whether it need not be measured."""
        return (target.name, repr(key), repr(tile)) in self._known

    def measure(self, target: Target, key: Any, tile: Any) -> float:
        """Known, or measured now; a tile that does not fit the device takes for ever."""
        place = (target.name, repr(key), repr(tile))
        if place not in self._known:
            line = dict(zip(("table", "entry", "tile"), place, strict=True))
            self._write(line)
            ms, why = _measured(target, key, tile)
            self._known[place] = ms
            self._write(line | ({"ms": ms} if ms < math.inf else {"ms": None, "why": why}))
        return self._known[place]

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _measured(target: Target, key: Any, tile: Any) -> tuple[float, str]:
    """Milliseconds, or why not. Raises what means that the device is lost."""
    try:
        return round(target.time(key, tile), 5), ""
    except Exception as error:  # noqa: BLE001 - whatever a compiler says of a tile
        torch.cuda.synchronize()  # raises where the device is lost
        return math.inf, f"{type(error).__name__}: {error}"[:200]


class Compilers:
    """Processes that call what will be timed once, so that it is compiled; what they find wrong the measuring will too."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None

    def prepare(self, name: str, key: Any, tiles: Sequence[Any]) -> None:
        """Compile all; a process that breaks costs time alone."""
        if len(tiles) < 2:
            return
        self._pool = self._pool or ProcessPoolExecutor(self._num_processes, get_context("spawn"))
        futures = [self._pool.submit(call_once, name, key, tile) for tile in tiles]
        end_s = time.monotonic() + _COMPILE_S
        try:
            for future in futures:
                future.result(max(0.0, end_s - time.monotonic()))
        except (BrokenProcessPool, TimeoutError):
            self.close()

    def close(self) -> None:
        """End them, whatever they do."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)


def call_once(name: str, key: Any, tile: Any) -> str:
    """In a compiling process: what is wrong with a tile, empty if nothing."""
    target = TARGETS[name]()
    module = sys.modules[type(target).__module__]

    def once(setting: Any, work: Callable[[], Any], *_: Any, **__: Any) -> float:
        work()
        torch.cuda.synchronize()
        return 0.0

    try:
        with mock.patch.object(module, "median_ms", once):
            target.time(key, tile)
        torch.cuda.empty_cache()
    except Exception as error:  # noqa: BLE001 - the measuring process will meet it and write it down
        return f"{type(error).__name__}: {error}"
    return ""


def text_of(target: Target, old: str) -> str:
    """The file's text with the table as it now stands."""
    rewrite = getattr(target, "text", None)
    return rewrite(old) if rewrite is not None else replaced(old, target.assigned, target.lines())


def difference(target: Target, old: str | None = None) -> str:
    """The table's new text against the file's, or another, as a patch."""
    old = target.path.read_text(encoding="utf-8") if old is None else old
    new = text_of(target, old)
    name = str(target.path.relative_to(ROOT))
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    return "".join(difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"))


def run(names: Iterable[str], output: Path, budget_s: float, *, is_dry: bool) -> None:
    """Tune these tables, in this order."""
    times, compilers, end_s = Times(output / "tune.jsonl"), Compilers(_PROCESSES), time.monotonic() + budget_s
    patches: dict[str, str] = {}
    for name in names:
        target = TARGETS[name]()
        old, until_s = target.path.read_text(encoding="utf-8"), time.monotonic() + _SHARE * (end_s - time.monotonic())

        def prepare(key: Any, tiles: Sequence[Any], target: Target = target, name: str = name) -> None:
            compilers.prepare(name, key, [tile for tile in tiles if not times.knows(target, key, tile)])

        def decided(target: Target = target, name: str = name, old: str = old) -> None:
            patches[name] = difference(target, old)
            (output / "tune.patch").write_text("".join(patches.values()), encoding="utf-8")
            if not is_dry:
                target.write()

        def measure(key: Any, tile: Any, target: Target = target) -> float:
            return times.measure(target, key, tile)

        def is_over(until_s: float = until_s) -> bool:
            return time.monotonic() > until_s

        changes = tune(target, measure, is_over, prepare, decided)
        print("\n".join(changes or [f"{name}: nothing is quicker"]), flush=True)
    compilers.close()
    print("".join(patches.values()))


def main() -> None:
    """As tune.py calls it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--only", nargs="+", required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if torch.cuda.is_available():
        run(given.only, given.output, given.budget, is_dry=given.dry_run)
        return
    if not given.dry_run:
        raise SystemExit("tuning measures, and there is no GPU; --dry-run shows what it would try")
    for name in given.only:
        target = TARGETS[name]()
        print(name, {key: len(target.candidates(key, tile)) for key, tile in target.entries().items()})


if __name__ == "__main__":
    main()
