"""What every benchmark writes: its figures with date, machine, command, commit and load, printed and kept as JSON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from llmd_plugins.commands.bench.report import stamp, write_json

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """The commit that is measured, marked where the tree differs from it."""
    try:
        text = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.strip()


def report(figures: dict[str, Any], output: Path | None, *, shown: tuple[str, ...] = ()) -> None:
    """Print the figures (those `shown`, or all) and write them with their stamp where `output` says."""
    print(json.dumps({name: figures[name] for name in shown} if shown else figures, indent=2))
    if output is not None:
        write_json(output, stamp() | {"commit": commit(), "load_before": round(os.getloadavg()[0], 1)} | figures)
