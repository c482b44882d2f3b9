"""Results as tables: what was asked, got and met; then every case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.figures import Verdict, judge


def render(results: Sequence[dict[str, Any]]) -> str:
    """Both tables: part, case, and what was found or why nothing was."""
    lines = ["| part | case | found |", "|---|---|---|"]
    lines += [f"| {line['part']} | {line['case']} | {found(line)} |" for line in results]
    return figures(results) + "\n" + "\n".join(lines) + "\n"


def figures(results: Sequence[dict[str, Any]]) -> str:
    """The figures alone, those that were asked for first."""
    verdicts = sorted(judge(results), key=lambda verdict: verdict.figure.asked() == "–")
    lines = ["| figure | asked | got | met |", "|---|---|---|---|"]
    lines += [f"| {one.figure.words} | {one.figure.asked()} | {_got(one)} | {one.met} |" for one in verdicts]
    return "\n".join(lines) + "\n"


def found(line: dict[str, Any]) -> str:
    """A case's numbers, or why there are none, in a line."""
    if "error" in line:
        return f"**failed**: {_flat(line['error'], 200)}"
    if "dropped" in line:
        return f"dropped: {line['dropped']}"
    return ", ".join(f"{name} {_shown(value)}" for name, value in line["figures"].items() if value is not None)


def _got(verdict: Verdict) -> str:
    return _flat(verdict.why_not, 60) if verdict.got is None else _shown(verdict.got)


def _flat(text: str, most: int) -> str:
    return " ".join(text.split())[:most].replace("|", "/")


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
