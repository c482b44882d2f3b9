"""Responses that were answered, kept in memory: bounded by number and bytes, the oldest go first, each key sees its own."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from llmd.api.v1 import InvalidRequest, RequestRefused
from llmd_plugins.responses.feed import Feed

if TYPE_CHECKING:
    from llmd_plugins.responses import ResponsesSettings

Name = tuple[str, str]  # the API key's, the response's

_ENTRY_BYTES = 256  # about what an entry takes besides its texts
_FEED_SHARE = 8  # of all that may be kept, one response's events may take so much


@dataclass(frozen=True, slots=True)
class Stored:
    """One response as JSON, with the input that it answers and the response before it."""

    response: bytes
    input_items: bytes
    previous_id: str | None
    item_ids: tuple[str, ...] = ()  # of input and output
    feed: Feed | None = None  # its events, where it was streamed in the background

    @property
    def num_bytes(self) -> int:
        """How much memory it takes."""
        events = self.feed.num_bytes if self.feed is not None else 0
        return len(self.response) + len(self.input_items) + events + _ENTRY_BYTES * (1 + len(self.item_ids))


class Store:
    """Loop thread only. `running` are the tasks of responses in the background."""

    def __init__(self, settings: ResponsesSettings) -> None:
        self._settings = settings
        self._kept: OrderedDict[Name, tuple[Stored, int]] = OrderedDict()  # with its bytes when it was put
        self._places: dict[Name, Name] = {}  # an item's key and id → its response
        self.num_bytes = 0
        self.running: dict[Name, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def new_feed(self) -> Feed:
        """For the events of one response."""
        return Feed(max(1, self._settings.max_stored_bytes // _FEED_SHARE))

    def put(self, key: str, response: dict[str, Any], input_items: list[dict[str, Any]], feed: Feed | None = None) -> None:
        """Keep a response, in the place of its earlier state where there was one."""
        name = (key, response["id"])
        self._drop(name)
        ids = tuple(item["id"] for item in (*input_items, *response["output"]) if "id" in item)
        stored = Stored(orjson.dumps(response), orjson.dumps(input_items), response["previous_response_id"], ids, feed)
        size = stored.num_bytes
        if size > self._settings.max_stored_bytes or not self._settings.max_stored:
            return
        self._kept[name] = stored, size
        self._places.update(((key, item_id), name) for item_id in ids)
        self.num_bytes += size
        while len(self._kept) > self._settings.max_stored or self.num_bytes > self._settings.max_stored_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, name: Name) -> None:
        stored, size = self._kept.pop(name, (None, 0))
        if stored is not None:
            self.num_bytes -= size
            for item_id in stored.item_ids:
                if self._places.get((name[0], item_id)) == name:
                    del self._places[name[0], item_id]

    def get(self, key: str, response_id: str) -> Stored:
        """A response of this key. Raises RequestRefused with 404."""
        stored, _ = self._kept.get((key, response_id), (None, 0))
        if stored is None:
            message = f"there is no response {response_id[:80]!r}, or it is not kept any more"
            raise RequestRefused(404, message, code="response_not_found", param="response_id")
        return stored

    def item(self, key: str, item_id: str, path: str) -> dict[str, Any]:
        """An item of a response of this key. Raises RequestRefused with 404 that names `path`."""
        name = self._places.get((key, item_id))
        if name is not None:
            stored = self.get(*name)
            for item in (*orjson.loads(stored.input_items), *orjson.loads(stored.response)["output"]):
                if item.get("id") == item_id:
                    found: dict[str, Any] = item
                    return found
        message = f"{path}: there is no item {item_id[:80]!r}, or it is not kept any more"
        raise RequestRefused(404, message, code="item_not_found", param=path)

    def delete(self, key: str, response_id: str) -> None:
        """Forget a response; one that still runs is ended. Raises RequestRefused with 404."""
        self.get(key, response_id)
        if (task := self.running.get((key, response_id))) is not None:
            task.cancel()
        self._drop((key, response_id))

    def conversation(self, key: str, response_id: str | None) -> list[dict[str, Any]]:
        """All items up to and with that response, oldest first. Raises InvalidRequest where one is not kept any more."""
        turns: list[list[dict[str, Any]]] = []
        while response_id is not None:
            stored, _ = self._kept.get((key, response_id), (None, 0))
            if stored is None:
                message = f"previous_response_id: there is no response {response_id[:80]!r}, or it is not kept any more"
                raise RequestRefused(404, message, param="previous_response_id", code="previous_response_not_found")
            self._kept.move_to_end((key, response_id))
            response = orjson.loads(stored.response)
            if response["status"] in ("queued", "in_progress"):
                message = f"previous_response_id: {response_id!r} is not finished yet"
                raise InvalidRequest(message, param="previous_response_id", code="invalid_value")
            turns.append([*orjson.loads(stored.input_items), *response["output"]])
            response_id = stored.previous_id
        return [item for turn in reversed(turns) for item in turn]
