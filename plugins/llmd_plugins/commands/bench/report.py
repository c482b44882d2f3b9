"""How a run is shown, and kept as JSON."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmd_plugins.commands.bench.stats import METRICS

_WIDTH = 58


def machine() -> dict[str, Any]:
    """Where a figure was taken: without it, it says nothing."""
    import os

    facts: dict[str, Any] = {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        facts["cpu"] = names[0] if names else platform.machine()
    if (torch := sys.modules.get("torch")) is not None:
        facts["torch"] = torch.__version__
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
    return facts


def stamp() -> dict[str, Any]:
    """Date, machine and command."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "command": sys.argv}


def _line(name: str, value: Any) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{name:<{_WIDTH - 14}}{shown:>14}"


def serve_lines(summary: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> list[str]:
    """The table of `bench serve`."""
    lines = [
        " Serving benchmark ".center(_WIDTH, "="),
        _line("Successful requests:", summary["completed"]),
        _line("Failed requests:", summary["failed"]),
        _line("Benchmark duration (s):", summary["duration"]),
        _line("Total input tokens:", summary["total_input_tokens"]),
        _line("Total generated tokens:", summary["total_output_tokens"]),
        _line("Request throughput (req/s):", summary["request_throughput"]),
    ]
    if "request_goodput" in summary:
        lines.append(_line("Request goodput (req/s):", summary["request_goodput"]))
    lines += [
        _line("Output token throughput (tok/s):", summary["output_throughput"]),
        _line("Total token throughput (tok/s):", summary["total_token_throughput"]),
        _line("Most requests at once:", summary["max_concurrent_requests"]),
    ]
    for metric in metrics:
        lines.append(f" {METRICS[metric]} ".center(_WIDTH, "-"))
        for name in ("mean", "median", *(f"p{percentile:g}" for percentile in percentiles if percentile != 50)):
            lines.append(_line(f"{name.capitalize()} {metric.upper()} (ms):", summary[f"{name}_{metric}_ms"]))
    lines.append("=" * _WIDTH)
    lines += [f"failed {count} x: {reason}" for reason, count in summary["failures"].items()]
    if not summary["tokens_counted_by_server"]:
        lines.append("The server sent no usage for some requests: their chunks were counted as tokens.")
    return lines


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a result; floats that JSON has no word for become null."""
    import orjson

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2) + b"\n")
