"""Responses that were answered, kept in memory: bounded by number and bytes, the oldest go first, each key sees its own."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from llmd.api.v1 import InvalidRequest, RequestRefused

if TYPE_CHECKING:
    from llmd_plugins.responses import ResponsesSettings

Name = tuple[str, str]  # the API key's, the response's


@dataclass(frozen=True, slots=True)
class Stored:
    """One response as JSON, with the input that it answers and the response before it."""

    response: bytes
    input_items: bytes
    previous_id: str | None

    @property
    def num_bytes(self) -> int:
        """How much memory it takes."""
        return len(self.response) + len(self.input_items) + 256


class Store:
    """Loop thread only. `running` are the tasks of responses in the background."""

    def __init__(self, settings: ResponsesSettings) -> None:
        self._settings = settings
        self._kept: OrderedDict[Name, Stored] = OrderedDict()
        self.num_bytes = 0
        self.running: dict[Name, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: str, response: dict[str, Any], input_items: list[dict[str, Any]]) -> None:
        """Keep a response, in the place of its earlier state where there was one."""
        self._drop((key, response["id"]))
        stored = Stored(orjson.dumps(response), orjson.dumps(input_items), response["previous_response_id"])
        if stored.num_bytes > self._settings.max_stored_bytes or not self._settings.max_stored:
            return
        self._kept[key, response["id"]] = stored
        self.num_bytes += stored.num_bytes
        while len(self._kept) > self._settings.max_stored or self.num_bytes > self._settings.max_stored_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, name: Name) -> None:
        if (stored := self._kept.pop(name, None)) is not None:
            self.num_bytes -= stored.num_bytes

    def get(self, key: str, response_id: str) -> Stored:
        """A response of this key. Raises RequestRefused with 404."""
        if (stored := self._kept.get((key, response_id))) is None:
            message = f"there is no response {response_id[:80]!r}, or it is not kept any more"
            raise RequestRefused(404, message, code="response_not_found", param="response_id")
        return stored

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
            if (stored := self._kept.get((key, response_id))) is None:
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
