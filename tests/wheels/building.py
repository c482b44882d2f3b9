"""Builds wheels as their authors do."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
GOOD = ("acme-gate", "acme-hybrid", "acme-parallel", "acme-ternary")


def run(*command, **options):
    """A program that must succeed; its output."""
    ended = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False, **options
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def build_wheel(project: Path, into: Path) -> Path:
    """The project's wheel, without a network."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", into, project)
    (wheel,) = into.glob(f"{project.name.replace('-', '_')}-*.whl")
    return wheel
