"""Finding a request in a file of JSON log lines."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

MAX_LINES = 200  # of one request


class Found(NamedTuple):
    """The receipt of a request, and the other lines about it."""

    receipt: dict[str, Any] | None
    lines: list[dict[str, Any]]


def search(lines: Iterable[str], request_id: str) -> Found:
    """All that is told about a request; the last receipt counts, lines that are no JSON are passed over."""
    receipt, others = None, deque[dict[str, Any]](maxlen=MAX_LINES)
    for line in lines:
        entry = _entry(line)
        if entry is None or not _is_about(entry, request_id):
            continue
        if entry.get("logger") == "llmd.access":
            receipt = entry
        else:
            others.append(entry)
    return Found(receipt, list(others))


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "request_id" in entry else None


def _is_about(entry: dict[str, Any], request_id: str) -> bool:
    """By the request's id, or by an answer's (`chatcmpl-<id>`)."""
    found = str(entry["request_id"])
    return bool(found) and (request_id == found or request_id.endswith(f"-{found}") or f"_{found}-" in request_id)
