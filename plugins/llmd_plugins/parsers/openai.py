"""Harmony, the format of gpt-oss: messages with a header (channel, recipient) and a body, between special tokens.

analysis is reasoning, final is the answer, commentary what is said on the way to it; what goes to
`functions.name` is a call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llmd.api.v1 import (
    CallForm,
    GrammarWriter,
    NotACall,
    ParserSpec,
    ParserSteps,
    ToolParser,
    hookimpl,
    json_call,
    new_call_id,
    plain_name,
    without,
)

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


def _message(writer: GrammarWriter, channel: str, end: str) -> str:
    """A message to nobody in particular, and what stands behind it."""
    body = writer.terminal(without((_START, _CHANNEL, *_ENDS)))
    return writer.rule(f"{writer.text(f'{_CHANNEL}{channel}{_MESSAGE}')} {writer.upto(body, end)}")


def _lead(writer: GrammarWriter) -> str:
    """The model may think, and say what it is about to do, before it calls."""
    next_message = f"<|end|>{_START}assistant"
    return f"{_message(writer, 'analysis', next_message)}? {_message(writer, 'commentary', next_message)}?"


def _free(writer: GrammarWriter) -> str:
    """Thoughts and an answer, whose end is the end of all."""
    body = writer.terminal(without((_START, _CHANNEL, *_ENDS)))
    thoughts = _message(writer, "analysis", f"<|end|>{_START}assistant")
    return f"{thoughts}? {writer.text(f'{_CHANNEL}final{_MESSAGE}')} {body}"


FORM = CallForm(
    call=json_call(f"{_CHANNEL}commentary to=functions.{{name}} <|constrain|>json{_MESSAGE}", "<|call|>", name=plain_name),
    max_calls=1,  # a call ends the answer
    opens=(_CHANNEL,),
    lead=_lead,
    free=_free,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """gpt-oss with tools."""
    summary = "harmony messages to functions.name: gpt-oss"
    return [ParserSpec(name="openai", summary=summary, build=HarmonyParser, form=FORM)]


@hookimpl
def llmd_register_reasoning_parsers() -> list[ParserSpec]:
    """gpt-oss without tools."""
    summary = "harmony channels analysis and final: gpt-oss"
    return [ParserSpec(name=name, summary=summary, build=_build_reasoning) for name in ("openai_gptoss", "gpt_oss")]


def _build_reasoning(prompt: str = "") -> HarmonyParser:
    return HarmonyParser(())  # no function is known: none is called
