"""Results as one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def render(results: Sequence[dict[str, Any]]) -> str:
    """A line each: part, case, and what was found or why nothing was."""
    lines = ["| part | case | found |", "|---|---|---|"]
    lines += [f"| {line['part']} | {line['case']} | {_found(line)} |" for line in results]
    return "\n".join(lines) + "\n"


def _found(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"**failed**: {' '.join(line['error'].split())[:200]}".replace("|", "/")
    if "dropped" in line:
        return f"dropped: {line['dropped']}"
    return ", ".join(f"{name} {_shown(value)}" for name, value in line["figures"].items() if value is not None)


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
