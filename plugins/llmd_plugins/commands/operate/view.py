"""What the commands print: plain lines of a daemon's state, made of the admin routes' JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
_COLUMNS = (
    ("REQUEST", "request_id"), ("KEY", "key"), ("MODEL", "model"), ("ADAPTER", "adapter"), ("PHASE", "phase"),
    ("AGE", "age_s"), ("PROMPT", "prompt_tokens"), ("CACHED", "cached_tokens"), ("OUTPUT", "output_tokens"),
)  # fmt: skip
_MAX_CELL = 36


class Rates(NamedTuple):
    """What happened between two readings, a second."""

    prompt: float = 0.0
    output: float = 0.0
    steps: float = 0.0


def rates(now: Row, before: Row | None, seconds: float) -> Rates:
    """Tokens and steps a second of one model; zeros without an earlier reading or after a restart."""
    if before is None or seconds <= 0 or now["num_steps"] < before["num_steps"]:
        return Rates()
    names = ("num_prompt_tokens", "num_output_tokens", "num_steps")
    return Rates(*((now[name] - before[name]) / seconds for name in names))


def duration(seconds: float) -> str:
    """`4.2s`, `3m07s`, `5h12m`, `3d04h`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if not hours:
        return f"{minutes}m{rest:02d}s"
    days, hours_left = divmod(hours, 24)
    return f"{days}d{hours_left:02d}h" if days else f"{hours}h{minutes_left:02d}m"


def bar(share: float, width: int = 20) -> str:
    """A bar of ASCII for a share between 0 and 1."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "[" + "#" * filled + "." * (width - filled) + f"] {100 * share:5.1f} %"


def _cell(value: Any) -> str:
    """Text without control characters, cut to a bound: names come from clients too."""
    text = "".join(character if character.isprintable() else "?" for character in str(value))
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "~"


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    is_number = [all(isinstance(row[column], int | float) for row in rows[1:]) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, is_number, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def head_line(status: Row) -> str:
    """The daemon in one line."""
    return (
        f"llmd {_cell(status['version'])}: {status['state']}, up {duration(status['uptime_s'])}, pid {status['pid']}, "
        f"{status['num_requests']} requests"
    )


def model_lines(model: Row, speed: Rates | None = None) -> list[str]:
    """A model in two to four lines."""
    name, stats = _cell(", ".join(model["names"])), model["stats"]
    if stats is None:
        progress = model["progress"]
        return [f"{name}: {model['state']}, {_cell(progress['phase'])} ({100 * progress['fraction']:.0f} %)"]
    lines = [
        f"{name}: {model['state']}, {stats['num_running']} running, {stats['num_waiting']} waiting "
        f"({stats['num_waiting_tokens']} tokens), {stats['num_preemptions']} preemptions",
        f"  KV {bar(stats['kv_usage'])}   prefix hits {_share(stats['prefix_hits'], stats['prefix_queries'])}",
    ]
    if (share := stats.get("memory_utilization")) is not None:
        lines.append(f"  memory bandwidth {bar(share)} of the last decode steps")
    if speed is not None:
        lines.append(f"  {speed.prompt:.1f} prompt tok/s, {speed.output:.1f} output tok/s, {speed.steps:.1f} steps/s")
    return lines


def memory_lines(rows: Sequence[Row]) -> list[str]:
    """Where a model's memory goes, as it was told at the start; nothing where that is not known."""
    values = [size(row["value"]) if row["is_bytes"] else f"{row['value']:,}" for row in rows]
    return [f"  {row['name']:<14}{value:>12}  {row['note']}".rstrip() for row, value in zip(rows, values, strict=True)]


def size(num_bytes: float) -> str:
    """`1.50 GiB`, `20.0 MiB`, `3 KiB`."""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):.2f} GiB"
    return f"{num_bytes / (1 << 20):.1f} MiB" if num_bytes >= 1 << 20 else f"{num_bytes / 1024:.0f} KiB"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def request_lines(rows: Sequence[Row]) -> list[str]:
    """A table of running requests, oldest first."""
    if not rows:
        return ["no requests"]
    shown = [[duration(row[name]) if name == "age_s" else row[name] for _, name in _COLUMNS] for row in rows]
    columns = [index for index, (_, name) in enumerate(_COLUMNS) if any(row[name] not in ("", None) for row in rows)]
    titles = [title for title, _ in _COLUMNS]
    return table([[line[index] for index in columns] for line in (titles, *shown)])


def usage_lines(what: str, rows: Sequence[Row], limit: int = 10) -> list[str]:
    """A table of what keys or adapters have used, most output first."""
    if not rows:
        return []
    first = sorted(rows, key=lambda row: -row["output_tokens"])[:limit]
    names = ("running", "requests", "prompt_tokens", "cached_tokens", "output_tokens")
    titles = [what.upper(), "MODEL", "RUNNING", "ENDED", "PROMPT", "CACHED", "OUTPUT"]
    return ["", *table([titles, *([row[what], row["model"], *(row[name] for name in names)] for row in first)])]


def adapter_lines(models: Sequence[Row], limit: int = 10) -> list[str]:
    """A table of where adapters are, those that are wanted first."""
    rows = [(adapter, model["names"][0]) for model in models for adapter in model["adapters"]]
    if not rows:
        return []
    rows.sort(key=lambda row: (-row[0]["num_running"], -row[0]["num_waiting"], row[0]["slot"] is None))
    names = ("rank", "num_running", "num_waiting", "num_loads", "num_evictions")
    titles = ["ADAPTER", "MODEL", "STATE", "SLOT", "RANK", "RUNNING", "WAITING", "LOADS", "EVICTED", "WAITED"]
    lines = [
        [each["name"], model, each["state"], "-" if each["slot"] is None else each["slot"], *(each[name] for name in names),
         duration(each["wait_s"])]
        for each, model in rows[:limit]
    ]  # fmt: skip
    more = [f"and {len(rows) - limit} more"] if len(rows) > limit else []
    return ["", *table([titles, *lines]), *more]


def status_lines(status: Row) -> list[str]:
    """`llmd status`."""
    lines = [head_line(status)]
    for model in status["models"]:
        lines += [*model_lines(model), *memory_lines(model.get("memory") or ())]
    lines += usage_lines("key", status["keys"]) + usage_lines("adapter", status["adapters"])
    return lines + adapter_lines(status["models"])


def top_lines(status: Row, before: Row | None, seconds: float) -> list[str]:
    """One picture of `llmd top`."""
    earlier = {tuple(model["names"]): model["stats"] for model in before["models"]} if before else {}
    lines = [head_line(status)]
    for model in status["models"]:
        stats = model["stats"]
        lines += model_lines(model, rates(stats, earlier.get(tuple(model["names"])), seconds) if stats else None)
    lines += ["", *request_lines(status["requests"])]
    lines += usage_lines("key", status["keys"]) + usage_lines("adapter", status["adapters"])
    return lines + adapter_lines(status["models"])


def receipt_lines(row: Row) -> list[str]:
    """`llmd explain`: what became of a request, or where it is."""
    if row.get("state") == "running":
        head = f"{_cell(row['request_id'])}: running, in {row['phase']} for {duration(row['age_s'])} since it came"
    else:
        ends = ", ".join(row.get("finish_reasons") or ()) or "no generation"
        head = f"{_cell(row['request_id'])}: {_cell(row['method'])} {_cell(row['route'])} {row['status']}, {ends}"
    gone = ["  the client left before its end"] if row.get("client_gone") else []
    error = [f"  error: {_cell_long(row['error'])}"] if row.get("error") else []
    left_out = {"state", "request_id", "method", "route", "status", "finish_reasons", "client_gone", "error", "phase"}
    facts = [(name, value) for name, value in row.items() if name not in left_out and value not in (None, "")]
    return [head, *gone, *error, *(f"  {name:<14} {_cell(value)}" for name, value in facts)]


def _cell_long(text: Any) -> str:
    return "".join(character if character.isprintable() else " " for character in str(text)[:500])


def reload_lines(report: Mapping[str, Any], *, is_dry: bool) -> list[str]:
    """What a reload did, or would do: the reasons against it, else a line for each key that differs."""
    if report["refused"]:
        return [*report["problems"], "refused: nothing changes" if is_dry else "refused: nothing was changed"]
    lines = [_change_line(change) for change in report["changes"]]
    return lines or ["the configuration is the one that runs"]


def _change_line(change: Mapping[str, Any]) -> str:
    values = f" ({change['old']} → {change['new']})" if change["old"] or change["new"] else ""
    return f"{change['key']}: {change['outcome']}{values}"
