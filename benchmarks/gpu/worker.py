"""Runs the cases of one part and writes a JSON line before and after each: what breaks this process loses one case only."""

from __future__ import annotations

import argparse
import importlib
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.setting import Setting, Uncapturable, wait


def main() -> None:
    """As run.py calls it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ceilings", type=json.loads, default={})
    parser.add_argument("--done", type=json.loads, default=[], help="cases that need not be run again")
    given = parser.parse_args()
    setting = Setting(torch.device(given.device), given.tiny, given.model, given.output.parent, given.ceilings)
    torch.manual_seed(0)
    if given.device == "cpu":
        torch.set_num_threads(1)
    cases = importlib.import_module(f"benchmarks.gpu.{given.module}").cases(setting)
    with given.output.open("a", encoding="utf-8") as file:
        for name, work in cases.items():
            if name not in given.done:
                run(name, work, setting, file)


def run(name: str, work: Any, setting: Setting, file: Any) -> None:
    """One case; an error that leaves the device whole is written down, any other ends the process."""
    write(file, {"case": name})
    start = time.perf_counter()
    try:
        figures = work()
        wait(setting.device)
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        write(file, {"case": name, "error": f"out of memory: {error}"})
    except Uncapturable as error:
        found = {"error": f"no graph can hold it: {error}"} if error.figures is None else {"figures": error.figures}
        write(file, {"case": name, **found})
        raise SystemExit("a capture failed: the next case gets a new process") from error
    except Exception as error:  # noqa: BLE001 - a case must not take the others with it
        trace = traceback.format_exc(limit=-6)
        write(file, {"case": name, "error": f"{type(error).__name__}: {error}", "trace": trace})
        wait(setting.device)  # raises where the device is lost
    else:
        write(file, {"case": name, "figures": figures, "s": round(time.perf_counter() - start, 2)})


def write(file: Any, line: dict[str, Any]) -> None:
    """At once: the next thing may be a crash."""
    file.write(json.dumps(line, default=str) + "\n")
    file.flush()


if __name__ == "__main__":
    main()
