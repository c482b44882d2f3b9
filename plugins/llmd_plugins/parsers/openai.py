"""Harmony, the format of gpt-oss: messages with a header (channel, recipient) and a body, between special tokens.

analysis is reasoning, final is the answer, commentary what is said on the way to it; what goes to
`functions.name` is a call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llmd.api.v1 import NotACall, ParserSpec, ParserSteps, ToolParser, hookimpl, new_call_id

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_MAX_HEADER = 512
_HEADER = re.compile(
    r"(?:assistant)?\s*(?:to=(?P<first>[^\s<]+))?\s*"
    r"(?:<\|channel\|>(?P<channel>\w+)\s*(?:to=(?P<to>[^\s<]+))?[^<]*)?(?:<\|constrain\|>[^<]*)?"
)


class HarmonyParser(ToolParser):
    """Reads all three at once: reasoning, tool calls, content. Text outside of messages is content."""

    OPENS = (_START, _CHANNEL)
    CLOSES = _ENDS
    splits_reasoning = True

    def __init__(self, tools: Sequence[Any] | None = None, *, make_id: Callable[[], str] = new_call_id) -> None:
        self._said: set[str] = set()
        super().__init__(tools, make_id=make_id)

    def _steps(self) -> ParserSteps[None]:
        while (tag := (yield from self._until(self.OPENS + self.CLOSES, self._say))) is not None:
            if tag in self.OPENS:
                yield from self._attempt(tag, self._message("" if tag == _START else tag))
        self._end_content()

    def _message(self, header: str) -> ParserSteps[None]:
        """One message, from its header on; the header is held."""
        text, _ = yield from self._up_to((_MESSAGE,), _MAX_HEADER)
        match = _HEADER.fullmatch(header + text)
        if match is None:
            raise NotACall
        recipient = match["to"] or match["first"]
        if recipient is None or recipient == "all":
            yield from self._body("reasoning" if match["channel"] == "analysis" else "content")
        elif recipient.startswith("functions."):
            yield from self._call(recipient.removeprefix("functions."))
        elif match["channel"] == "analysis":
            yield from self._body("reasoning")
        else:
            raise NotACall

    def _body(self, kind: str) -> ParserSteps[None]:
        self._drop()
        self._emit(kind, "\n" if kind in self._said else "")
        self._said.add(kind)
        yield from self._to_tag(lambda text: self._emit(kind, text))

    def _call(self, name: str) -> ParserSteps[None]:
        self._check_name(name)
        yield from self._skip_space()
        self._begin_call(name)
        if (yield from self._peek()) == "{":
            yield from self._arguments()
            yield from self._to_tag(self._say)
        else:
            yield from self._to_tag(self._argue)

    def _broken_arguments(self) -> ParserSteps[None]:
        yield from self._to_tag(self._argue)
        raise NotACall

    def _to_tag(self, put: Callable[[str], None]) -> ParserSteps[None]:
        """Read a body and its end; the next message's beginning ends it too."""
        tag = yield from self._until((*_ENDS, _START), put)
        if tag == _START:
            self._unread(len(tag))


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """gpt-oss with tools."""
    return [ParserSpec(name="openai", summary="harmony messages to functions.name: gpt-oss", build=HarmonyParser)]


@hookimpl
def llmd_register_reasoning_parsers() -> list[ParserSpec]:
    """gpt-oss without tools."""
    summary = "harmony channels analysis and final: gpt-oss"
    return [ParserSpec(name=name, summary=summary, build=_build_reasoning) for name in ("openai_gptoss", "gpt_oss")]


def _build_reasoning(prompt: str = "") -> HarmonyParser:
    return HarmonyParser(())  # no function is known: none is called
