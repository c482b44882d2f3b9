"""Verdicts that wheels ship: what `llmd plugin check` found when their authors ran it."""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, NamedTuple

FILE = "llmd-verdict.json"
_MAX_BYTES = 1 << 20
_RESULTS = ("passed", "failed", "skipped")


class ShippedVerdict(NamedTuple):
    """The counts of one verdict file, as its author's llmd wrote it."""

    llmd: str
    passed: int
    failed: int
    skipped: int

    def __str__(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"verdict: {counts} (llmd {self.llmd})"


def shipped_verdict(distribution: str) -> ShippedVerdict | None:
    """The verdict that an installed distribution brings along, or None: it has none, or one that cannot be read."""
    try:
        found = [Path(file.locate()) for file in files(distribution) or () if file.name == FILE]
        if not found or found[0].stat().st_size > _MAX_BYTES:
            return None
        content = json.loads(found[0].read_text(encoding="utf-8"))
    except (PackageNotFoundError, OSError, ValueError, RecursionError):
        return None
    return _counted(content)


def _counted(content: Any) -> ShippedVerdict | None:
    try:
        results = Counter(finding["result"] for finding in content["findings"])
        return ShippedVerdict(str(content["llmd"])[:40], *(results[name] for name in _RESULTS))
    except (KeyError, TypeError):
        return None
