"""Lists of files and batches, a page at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import InvalidRequest, receipt_of
from llmd_plugins.batches.state import Record, State, shown

if TYPE_CHECKING:
    from aiohttp import web

_MAX_PAGE = {"files": 10_000, "batches": 100}


def page_of(
    state: State, kind: str, request: web.Request, wanted: Callable[[Record], bool] = lambda record: True
) -> dict[str, Any]:
    """The owner's records, newest first, as `limit`, `after` and `order` ask. Raises InvalidRequest."""
    key = receipt_of(request).key
    kept = state.records[kind].values() if state.exists() and state.open() else ()
    found = [record for record in kept if record["key"] == key and wanted(record)]
    if _order(request) == "desc":
        found.reverse()
    if (after := request.query.get("after")) is not None:
        place = next((index for index, record in enumerate(found) if record["id"] == after), None)
        if place is None:
            raise InvalidRequest(f"after must be the id of one of them, got {after[:80]!r}", param="after")
        found = found[place + 1 :]
    limit = _limit(request, kind)
    data = [shown(record) for record in found[:limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": len(found) > limit}


def _order(request: web.Request) -> str:
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order must be 'asc' or 'desc', got {order[:80]!r}", param="order")
    return order


def _limit(request: web.Request, kind: str) -> int:
    most = _MAX_PAGE[kind]
    text = request.query.get("limit", "20" if kind == "batches" else str(most))
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or not 1 <= int(text) <= most:
        raise InvalidRequest(f"limit must be an integer between 1 and {most}, got {text[:80]!r}", param="limit")
    return int(text)
