"""One choice of a conversation's answer: what its text means, in content, reasoning and calls, and what it has cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.engine.step import FinishReason
from llmd.server.chat_types import TOOL_CALLS, ChatDelta
from llmd.text.parsers import ParsedDelta, Parser

if TYPE_CHECKING:
    from llmd.server.chat_plan import Plan
    from llmd.text.stream import RequestStream, TextDelta


class Leg:
    """One request to the engine for one or more choices, the first of which is `first`."""

    __slots__ = ("first", "is_thinking", "is_wasted", "stream")

    def __init__(self, stream: RequestStream, first: int, is_thinking: bool) -> None:
        self.stream, self.first, self.is_thinking = stream, first, is_thinking
        self.is_wasted = False  # its tokens are no part of the answer


class Choice:
    """One choice as it is read: its parser, and what its legs have cost."""

    __slots__ = (
        "begun_calls", "ended", "index", "leg", "num_reasoning_tokens", "parser", "plan", "spent", "thought", "trims",
        "was_reasoning",
    )  # fmt: skip

    def __init__(self, index: int, plan: Plan) -> None:
        self.index, self.plan = index, plan
        self.parser: Parser | None = None
        self.leg: Leg | None = None  # the one that is read; None between two
        self.begun_calls: set[int] = set()
        self.spent: list[int] = []  # tokens of the thinking leg
        self.thought = ""
        self.num_reasoning_tokens = 0
        self.was_reasoning = False
        self.trims = False  # white space between the thinking and the answer is part of neither
        self.ended = False

    def read(self, delta: TextDelta) -> list[ChatDelta]:
        """The news of a delta behind the thinking."""
        parser, ends = self.parser, delta.finish_reason is not None
        if parser is None:
            pieces = [ParsedDelta(delta.text)] if delta.text else []
        else:
            pieces = parser.feed(delta.text, delta.token_ids) if delta.text else []
            pieces += parser.finish() if ends else []
        if self.trims:
            pieces = self._trimmed(pieces)
        self.count_reasoning(pieces, delta)
        return self.news(self.wanted(pieces), delta, ends)

    def wanted(self, pieces: list[ParsedDelta]) -> list[ParsedDelta]:
        """The pieces without reasoning that nobody asked for and calls beyond the one that was."""
        wanted = []
        for piece in pieces:
            if piece.tool_call is not None:
                if piece.tool_call.index and not self.plan.parallel:
                    continue
                self.begun_calls.add(piece.tool_call.index)
            elif piece.reasoning and not self.plan.include_reasoning:
                continue
            wanted.append(piece)
        return wanted

    def news(self, pieces: list[ParsedDelta], delta: TextDelta, ends: bool) -> list[ChatDelta]:
        """One delta a piece; the tokens go with the first, the end with the last."""
        news = [ChatDelta(self.index, piece.content, piece.reasoning, piece.tool_call) for piece in pieces]
        if not news and (ends or delta.token_ids or delta.prompt_logprobs):
            news = [ChatDelta(self.index)]
        if not news:
            return news
        first, last = news[0], news[-1]
        first.token_ids, first.logprobs, first.prompt_logprobs = delta.token_ids, delta.logprobs, delta.prompt_logprobs
        if ends:
            self.ended = True
            called = self.begun_calls and delta.finish_reason is FinishReason.STOP
            last.finish_reason = TOOL_CALLS if called else delta.finish_reason
            last.stop_reason, last.error = delta.stop_reason, delta.error
        return news

    def count_reasoning(self, pieces: list[ParsedDelta], delta: TextDelta) -> None:
        """A delta's tokens count by the share of its text that is reasoning; those without text as the ones before."""
        num_shown = num_reasoning = 0
        for piece in pieces:
            num_reasoning += len(piece.reasoning)
            num_shown += len(piece.content) + len(piece.reasoning)
            num_shown += len(piece.tool_call.arguments) if piece.tool_call is not None else 0
            self.was_reasoning = bool(piece.reasoning)
        if num_reasoning:
            self.num_reasoning_tokens += len(delta.token_ids) * num_reasoning // num_shown
        elif self.was_reasoning:
            self.num_reasoning_tokens += len(delta.token_ids)

    def _trimmed(self, pieces: list[ParsedDelta]) -> list[ParsedDelta]:
        """The pieces without white space before the first that is more than that."""
        kept = []
        for piece in pieces:
            if self.trims and piece.tool_call is None:
                piece = piece._replace(content=piece.content.lstrip())
                if not piece.content:
                    continue
            self.trims = False
            kept.append(piece)
        return kept
