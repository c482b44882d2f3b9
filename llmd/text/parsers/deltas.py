"""What parsers say: pieces of content, of reasoning, of tool calls."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import NamedTuple, Protocol

_ALPHANUMERIC = string.ascii_letters + string.digits


class ToolCallDelta(NamedTuple):
    """A piece of one tool call. `id` and `name` come once, with the first piece; the `arguments` add up to JSON text."""

    index: int  # type: ignore[assignment]  # hides the method of tuples
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ParsedDelta(NamedTuple):
    """A piece of an answer: one of the three is set."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


class Parser(Protocol):
    """Splits one answer. However its text is cut into feeds, the pieces add up to the same."""

    needs_special_tokens: bool  # the text must contain the special tokens, which detokenizers leave out by default
    splits_reasoning: bool  # finds reasoning too: no reasoning parser goes before it

    def feed(self, text: str, token_ids: Sequence[int] = ()) -> list[ParsedDelta]:
        """Take in new text (and the ids it was made of): what is certain by now."""

    def finish(self) -> list[ParsedDelta]:
        """The text ended: the rest."""


def new_call_id() -> str:
    """`call_` and 24 hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"


def new_short_call_id() -> str:
    """Nine letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
