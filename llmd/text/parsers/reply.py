"""Reasoning first, then tool calls in what is left."""

from __future__ import annotations

from collections.abc import Sequence

from llmd.text.parsers.deltas import ParsedDelta, Parser


class ReplyParser:
    """Runs a reasoning parser, then a tool parser over its content; either may be missing."""

    def __init__(self, reasoning: Parser | None = None, tools: Parser | None = None) -> None:
        self._reasoning = None if tools is not None and tools.splits_reasoning else reasoning
        self._tools = tools
        parts = [part for part in (self._reasoning, tools) if part is not None]
        self.needs_special_tokens = any(part.needs_special_tokens for part in parts)
        self.splits_reasoning = any(part.splits_reasoning for part in parts) or self._reasoning is not None

    def feed(self, text: str, token_ids: Sequence[int] = ()) -> list[ParsedDelta]:
        """Take in new text."""
        if self._reasoning is None:
            return self._find_calls([ParsedDelta(content=text)], token_ids)
        return self._find_calls(self._reasoning.feed(text, token_ids))

    def finish(self) -> list[ParsedDelta]:
        """The text ended."""
        deltas = [] if self._reasoning is None else self._find_calls(self._reasoning.finish())
        return deltas if self._tools is None else deltas + self._tools.finish()

    def _find_calls(self, deltas: list[ParsedDelta], token_ids: Sequence[int] = ()) -> list[ParsedDelta]:
        if self._tools is None:
            return [delta for delta in deltas if delta != ParsedDelta()]
        found = []
        for delta in deltas:
            found += self._tools.feed(delta.content, token_ids) if delta.content else [delta] if delta.reasoning else []
        return found
