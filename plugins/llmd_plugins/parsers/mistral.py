"""Mistral: `[TOOL_CALLS]` and a JSON list, or (from v11 tokenizers on) name, `[ARGS]` and arguments for each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmd.api.v1 import (
    CallForm,
    JsonCallParser,
    ParserSpec,
    ParserSteps,
    ThinkingParser,
    hookimpl,
    json_call,
    new_short_call_id,
)

_TAG, _ARGUMENTS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralParser(JsonCallParser):
    """Reads `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` and `[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`."""

    OPENS = (_TAG,)

    def __init__(self, tools: Sequence[Any] | None = None, *, make_id: Callable[[], str] = new_short_call_id) -> None:
        super().__init__(tools, make_id=make_id)

    def _first(self, tag: str) -> ParserSteps[None]:
        if (yield from self._skip_space()) in ("[", "{"):
            yield from super()._first(tag)
        else:
            yield from self._headed_call()

    def _headed_call(self) -> ParserSteps[None]:
        name, tag = yield from self._head((_CALL_ID, _ARGUMENTS, "{"))
        call_id = ""
        if tag == _CALL_ID:
            call_id, _ = yield from self._head((_ARGUMENTS, "{"))
        yield from self._skip_space()
        yield from self._expect("{")
        self._unread()
        self._begin_call(self._check_name(name.strip()), call_id.strip() or None)
        yield from self._arguments()


class MistralThinkingParser(ThinkingParser):
    """Reads `[THINK]…[/THINK]`."""

    OPENS = ("[THINK]", "<think>")
    CLOSES = ("[/THINK]", "</think>")
    ENDS_BEFORE = (_TAG,)
    needs_special_tokens = True


# a JSON list of calls, which models of all versions understand
FORM = CallForm(
    call=json_call('{"name": {name}, "arguments": ', "}"),
    begin=f"{_TAG}[",
    between=", ",
    end="]",
    opens=MistralParser.OPENS,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Mistral models of all versions."""
    summary = "[TOOL_CALLS] and a JSON list, or name[ARGS]{…}: Mistral"
    return [ParserSpec(name="mistral", summary=summary, build=MistralParser, form=FORM)]


@hookimpl
def llmd_register_reasoning_parsers() -> list[ParserSpec]:
    """Magistral and what came after it."""
    return [ParserSpec(name="mistral", summary="[THINK]…[/THINK]: Magistral", build=MistralThinkingParser)]
