"""Runs parsers over text in pieces, and puts what they say in a form to compare."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "options": {"type": "object"},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "write-file.v2", "parameters": {"properties": {"text": {"type": "string"}}}}},
]


def counted_ids():
    """A maker of ids: id0, id1 …"""
    counter = itertools.count()
    return lambda: f"id{next(counter)}"


@dataclass
class Parsed:
    """A whole answer. `events` has it in order, neighbours of one kind joined."""

    content: str
    reasoning: str
    calls: list
    events: list

    @property
    def arguments(self):
        return [json.loads(arguments) for _, _, arguments in self.calls]

    @property
    def names(self):
        return [name for _, name, _ in self.calls]

    @property
    def everything(self):
        """All text that came out, white space aside."""
        pieces = [event[-1] for event in self.events]
        return "".join("".join(pieces).split())


def join(deltas):
    """Deltas as a Parsed."""
    events, calls = [], []
    for delta in deltas:
        call = delta.tool_call
        kinds = [bool(delta.content), bool(delta.reasoning), call is not None]
        assert sum(kinds) == 1, delta
        if call is None:
            kind, text = ("content", delta.content) if delta.content else ("reasoning", delta.reasoning)
        else:
            kind, text = call.index, call.arguments
            assert (call.index == len(calls)) == (call.id is not None) == (call.name is not None)
            if call.name is not None:
                calls.append([call.id, call.name, ""])
                events.append((("call", call.index), call.name))
            assert call.index == len(calls) - 1, "arguments of a call that is over"
            calls[-1][2] += text
        if text and events and events[-1][0] == kind:
            events[-1] = (kind, events[-1][1] + text)
        elif text:
            events.append((kind, text))
    content = "".join(text for kind, text in events if kind == "content")
    reasoning = "".join(text for kind, text in events if kind == "reasoning")
    return Parsed(content, reasoning, [tuple(call) for call in calls], events)


def parse(parser, *chunks):
    """What a parser makes of a text that comes in these pieces."""
    deltas = []
    for chunk in chunks:
        deltas += parser.feed(chunk)
    return join(deltas + parser.finish())


def cut(text, positions):
    """A text in pieces."""
    edges = [0, *sorted(position % (len(text) + 1) for position in positions), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]
