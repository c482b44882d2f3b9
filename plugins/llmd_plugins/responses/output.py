"""An answer as output items: events as they come; the whole answer is what the events have built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmd_plugins.responses.items import new_id

if TYPE_CHECKING:
    from llmd.api.v1 import ToolCallDelta

Event = dict[str, Any]


class Output:
    """Turns pieces of an answer into items and events; one item is open at a time."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._pieces: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []  # of its tokens, where they are wanted
        self._kind: str | None = None
        self._call: int | None = None

    def reasoning(self, text: str) -> list[Event]:
        """A piece of reasoning."""
        events: list[Event] = []
        if self._kind != "reasoning":
            item: dict[str, Any] = {
                "id": new_id("rs"),
                "type": "reasoning",
                "summary": [],
                "content": [],
                "encrypted_content": None,
            }
            events = [
                *self.close(),
                self._open("reasoning", item),
                self._part("added", {"type": "reasoning_text", "text": ""}),
            ]
        self._pieces.append(text)
        return [*events, self._event("reasoning_text.delta", content_index=0, delta=text)]

    def text(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """A piece of the message, with the log-probabilities of its tokens."""
        events: list[Event] = []
        if self._kind != "message":
            item = {"id": new_id("msg"), "type": "message", "role": "assistant", "content": []}
            events = [*self.close(), self._open("message", item), self._part("added", _text_part(""))]
        self._pieces.append(text)
        self._logprobs.extend(logprobs)
        return [*events, self._event("output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))]

    def tool_call(self, delta: ToolCallDelta) -> list[Event]:
        """A piece of a call."""
        events: list[Event] = []
        if self._kind != "function_call" or self._call != delta.index:
            item = {
                "id": new_id("fc"), "type": "function_call", "call_id": delta.id or new_id("call"),
                "name": delta.name or "", "arguments": "",
            }  # fmt: skip
            events = [*self.close(), self._open("function_call", item)]
            self._call = delta.index
        if delta.arguments:
            self._pieces.append(delta.arguments)
            events.append(self._event("function_call_arguments.delta", delta=delta.arguments))
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """End the open item."""
        if self._kind is None:
            return []
        item, text = self.items[-1], "".join(self._pieces)
        if self._kind == "function_call":
            item["arguments"] = text
            events = [self._event("function_call_arguments.done", arguments=text, name=item["name"])]
        elif self._kind == "message":
            item["content"] = [_text_part(text, self._logprobs)]
            events = [self._event("output_text.done", content_index=0, text=text, logprobs=self._logprobs)]
            events.append(self._part("done", item["content"][0]))
        else:
            item["content"] = [{"type": "reasoning_text", "text": text}]
            events = [self._event("reasoning_text.done", content_index=0, text=text)]
            events.append(self._part("done", item["content"][0]))
        item["status"] = status
        self._kind, self._pieces, self._logprobs = None, [], []
        return [*events, self._item_event("done")]

    def _open(self, kind: str, item: dict[str, Any]) -> Event:
        self._kind = kind
        self.items.append({**item, "status": "in_progress"})
        return self._item_event("added")

    def _item_event(self, what: str) -> Event:
        """The item as it is now: it goes on changing, the event does not."""
        item = dict(self.items[-1])
        return {"type": f"response.output_item.{what}", "output_index": len(self.items) - 1, "item": item}

    def _part(self, what: str, part: dict[str, Any]) -> Event:
        return self._event(f"content_part.{what}", content_index=0, part=part)

    def _event(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **place, **fields}


def _text_part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
