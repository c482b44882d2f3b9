"""Measures the tiles of kernels on this device and writes the quickest into their decision tables.

    python3 benchmarks/gpu/tune.py [--only TABLE …] [--dry-run] [--budget 480]

`--dry-run` shows the change instead of making it; without a GPU it shows what would be tried. An entry changes only for a
tile that is quicker than the present one by more than the noise. Entries behind the budget stay as they are.
"""

from __future__ import annotations

import argparse
import difflib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in ("", "plugins", "kernels"))
from benchmarks.gpu.host import ROOT
from benchmarks.gpu.tables import replaced
from benchmarks.gpu.tuned import TARGETS, Target

_NOISE = 0.03
Measure = Callable[[Any, Any], float]  # an entry's key and a tile → milliseconds; inf where the tile does not run


def tune(target: Target, measure: Measure, is_over: Callable[[], bool] = lambda: False) -> list[str]:
    """What changed, in words; the target's table holds the result."""
    changes = []
    for key, present in target.entries().items():
        if is_over():
            changes.append(f"{target.name}: the rest was not tried, the budget was spent")
            break
        times = {tile: measure(key, tile) for tile in dict.fromkeys((present, *target.candidates(key, present)))}
        best = min(times, key=times.__getitem__)
        if times[best] < times[present] * (1 - _NOISE):
            changes.append(f"{target.name} {key}: {present} {times[present]:.4f} ms -> {best} {times[best]:.4f} ms")
            target.set(key, best)
    return changes


def on_device(target: Target) -> Measure:
    """Times of calls with a tile in the table's place; a tile that does not fit the device takes for ever."""
    from triton.runtime.errors import OutOfResources

    def measure(key: Any, tile: Any) -> float:
        try:
            return target.time(key, tile)
        except (OutOfResources, RuntimeError, ValueError) as error:
            print(f"{target.name} {key} {tile}: {type(error).__name__}", file=sys.stderr)
            return math.inf

    return measure


def difference(target: Target) -> str:
    """The table's new text against the file's, as a patch."""
    old = target.path.read_text(encoding="utf-8")
    new = replaced(old, target.assigned, target.lines())
    name = str(target.path.relative_to(ROOT))
    return "".join(difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), name, name))


def main(arguments: list[str] | None = None) -> int:
    """Tune the chosen tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS), metavar="TABLE")
    parser.add_argument("--dry-run", action="store_true", help="show, write nothing")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds (default: %(default)s)")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not given.dry_run:
        parser.error("tuning measures, and there is no GPU; --dry-run shows what it would try")
    end_s = time.monotonic() + given.budget
    for name in given.only:
        target = TARGETS[name]()
        if not torch.cuda.is_available():
            counts = {key: len(target.candidates(key, present)) for key, present in target.entries().items()}
            print(f"{name}: tiles to try by entry: {counts}")
            continue
        print("\n".join(tune(target, on_device(target), lambda: time.monotonic() > end_s)))
        print(difference(target))
        if not given.dry_run:
            target.write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
