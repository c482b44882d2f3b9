"""An answer as content blocks: events as they come, and the whole answer by adding up the same events."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from llmd.api.v1 import ToolCallDelta

Event = dict[str, Any]

_EMPTY: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": "", "citations": None},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


def new_use_id() -> str:
    """`toolu_` and 24 hexadecimal digits."""
    return f"toolu_{secrets.token_hex(12)}"


class Blocks:
    """Turns pieces of an answer into events; one block is open at a time.

    `signature` goes with thinking: an opaque word that clients send back; None drops the thinking, as it was not asked for.
    """

    def __init__(self, signature: str | None) -> None:
        self._signature = signature
        self._index = -1
        self._kind: str | None = None  # of the open block
        self._call: int | None = None  # the tool call that the open block tells

    def thinking(self, text: str) -> list[Event]:
        """A piece of reasoning."""
        if self._signature is None:
            return []
        return [*self._enter("thinking"), self._delta("thinking_delta", "thinking", text)]

    def text(self, text: str) -> list[Event]:
        """A piece of the answer."""
        return [*self._enter("text"), self._delta("text_delta", "text", text)]

    def tool_call(self, delta: ToolCallDelta) -> list[Event]:
        """A piece of a tool call."""
        events: list[Event] = []
        if self._call != delta.index:
            block = {"type": "tool_use", "id": new_use_id(), "name": delta.name or "", "input": {}}
            events = [*self.finish(), self._start("tool_use", block)]
            self._call = delta.index
        if delta.arguments:
            events.append(self._delta("input_json_delta", "partial_json", delta.arguments))
        return events

    def finish(self) -> list[Event]:
        """Close the open block."""
        events: list[Event] = []
        if self._kind == "thinking":
            events.append(self._delta("signature_delta", "signature", self._signature or ""))
        if self._kind is not None:
            events.append({"type": "content_block_stop", "index": self._index})
        self._kind = self._call = None
        return events

    def _enter(self, kind: str) -> list[Event]:
        if self._kind == kind:
            return []
        return [*self.finish(), self._start(kind, _EMPTY[kind])]

    def _start(self, kind: str, block: dict[str, Any]) -> Event:
        self._kind, self._index = kind, self._index + 1
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, kind: str, name: str, value: str) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, name: value}}


_ADDS = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}


def content_of(events: list[Event]) -> list[dict[str, Any]]:
    """The blocks that the events add up to."""
    blocks: list[dict[str, Any]] = []
    pieces: list[dict[str, list[str]]] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
            pieces.append({})
        elif event["type"] == "content_block_delta":
            name = _ADDS[event["delta"]["type"]]
            pieces[-1].setdefault(name, []).append(event["delta"][name])
    for block, parts in zip(blocks, pieces, strict=True):
        texts = {name: "".join(values) for name, values in parts.items()}
        if block["type"] == "tool_use":
            block["input"] = _input(texts.get("partial_json", ""))
        else:
            block.update(texts)
    return blocks


def _input(text: str) -> dict[str, Any]:
    """Arguments as an object; what the model wrote and is none is shown under a name of Anthropic's own."""
    try:
        value = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return {"INVALID_JSON": text}
    return value if isinstance(value, dict) else {"INVALID_JSON": text}
