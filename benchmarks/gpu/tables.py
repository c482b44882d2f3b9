"""Rewrites the literals of decision tables where they stand, in the style of the files that hold them."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FOR_EVER = 1 << 62  # of a table by rows: as many as there may be


def replaced(source: str, name: str, lines: Sequence[str]) -> str:
    """The source with other lines between the brackets of what `name` is assigned. Raises ValueError if it is nowhere."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == name:
            old, last = source.splitlines(keepends=True), node.value.end_lineno or 0
            return "".join([*old[: node.value.lineno], *(f"{line}\n" for line in lines), *old[last - 1 :]])
    raise ValueError(f"{name} is assigned nowhere")


def renumbered(source: str, name: str, value: int) -> str:
    """The source with another number assigned to `name`, its comment kept. Raises ValueError if there is none."""
    found, count = re.subn(rf"(?m)^({re.escape(name)} = )\d+", rf"\g<1>{value}", source)
    if count != 1:
        raise ValueError(f"{name} is assigned {count} numbers")
    return found


def by_rows(entries: Sequence[tuple[int, Any]]) -> list[str]:
    """The lines of a table by the most rows."""
    return [f"    ({'1 << 62' if most == _FOR_EVER else most}, {called(tile)})," for most, tile in entries]


def by_device(table: Mapping[str, Mapping[int, Sequence[Any]]]) -> list[str]:
    """The lines of a table by device and head dim."""
    lines = []
    for device, dims in table.items():
        lines.append(f'    "{device}": {{')
        lines += [f"        {dim}: ({', '.join(map(called, tiles))})," for dim, tiles in dims.items()]
        lines.append("    },")
    return lines


def called(tile: Any) -> str:
    """The call that makes a tile."""
    return f"{type(tile).__name__}({', '.join(map(str, tile))})"


def write(path: Path, name: str, lines: Sequence[str]) -> None:
    """Put a table's new lines into its file."""
    path.write_text(replaced(path.read_text(encoding="utf-8"), name, lines), encoding="utf-8")
