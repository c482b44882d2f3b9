"""What a conversation's tools ask for: who reads the calls, and the grammar that forces them or holds strict ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from llmd.errors import InvalidRequest
from llmd.text.parsers import CallForm, JsonCallParser, Parser, Unforceable, json_call
from llmd.text.structured import Constraint

if TYPE_CHECKING:
    from llmd.plugin.specs import ParserSpec
    from llmd.server.chat_types import ChatCall
    from llmd.server.generate import ModelService
    from llmd.text.tokenizer import Tokenizer

_MANY = ("none", "auto", "required")
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)+"')


class ForcedCallParser(JsonCallParser):
    """The format of forced calls where a model's own cannot be forced: JSON between tags."""

    OPENS = ("<tool_call>",)
    CLOSES = ("</tool_call>",)


_FORM = CallForm(
    call=json_call('{"name": {name}, "arguments": ', "}"),
    begin="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    end="\n</tool_call>",
    opens=ForcedCallParser.OPENS,
)


class ToolPlan(NamedTuple):
    """What reads the calls, and what forces them; None for neither."""

    make_parser: Callable[[], Parser] | None = None
    constraint: Constraint | None = None


def tool_choice_of(call: ChatCall) -> str:
    """The call's choice, "auto" with tools and "none" without. Raises InvalidRequest for one that cannot be."""
    choice = call.tool_choice or ("auto" if call.tools else "none")
    if choice == "none":
        return choice
    if not call.tools:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    names = [str(_function(tool).get("name")) for tool in call.tools]
    if choice not in _MANY and choice not in names:
        known = ", ".join(names)[:200]
        raise InvalidRequest(f"tool_choice names {choice[:64]!r}, which is none of the tools: {known}", param="tool_choice")
    return choice


def plan_tools(service: ModelService, call: ChatCall, choice: str) -> ToolPlan:
    """How the tools of a call are served. Raises InvalidRequest."""
    if choice == "none":
        return ToolPlan()
    spec, tools = service.parsers.tool, list(call.tools or ())
    if choice == "auto":
        return _auto(spec, tools, call, service.tokenizer)
    parallel, added_tokens = call.parallel_tool_calls, service.tokenizer.added_tokens
    if spec is not None and (own := _own(spec, tools, choice, parallel, service.tokenizer)) is not None:
        return ToolPlan(lambda: spec.build(tools), own)
    forced = _FORM.constraint(tools, choice, parallel=parallel, added_tokens=added_tokens)
    return ToolPlan(lambda: ForcedCallParser(tools), forced)


def _auto(spec: ParserSpec | None, tools: list[Mapping[str, Any]], call: ChatCall, tokenizer: Tokenizer) -> ToolPlan:
    """Calls are up to the model; those of strict functions follow their schemas, or the request is refused."""
    if spec is None:
        raise InvalidRequest(
            "tool_choice auto needs a tool parser, and this model has none (models.tool_call_parser); with "
            "tool_choice 'required' a call is forced, with 'none' the tools are only shown to the model",
            param="tool_choice",
            code="unsupported_parameter",
        )
    is_strict = any(_function(tool).get("strict") for tool in tools)
    if not is_strict or call.params.structured_outputs is not None:  # the other holds the whole answer
        return ToolPlan(lambda: spec.build(tools))
    if spec.form is None:
        raise _refusal(spec, "its calls have no grammar")
    try:
        constraint = spec.form.constraint(
            tools, "auto", parallel=call.parallel_tool_calls, added_tokens=tokenizer.added_tokens
        )
    except Unforceable as reason:
        raise _refusal(spec, str(reason)) from None
    return ToolPlan(lambda: spec.build(tools), constraint)


def _refusal(spec: ParserSpec, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"strict functions are not served here with tool_choice auto ({spec.name}): {reason}; leave strict out, or force "
        "the call with tool_choice",
        param="tools",
        code="unsupported_parameter",
    )


def _own(
    spec: ParserSpec, tools: list[Mapping[str, Any]], choice: str, parallel: bool, tokenizer: Tokenizer
) -> Constraint | None:
    """What forces a call in the model's own format, where that can be."""
    if spec.form is not None:
        try:
            return spec.form.constraint(tools, choice, parallel=parallel, added_tokens=tokenizer.added_tokens)
        except Unforceable:
            return None
    constraint = spec.constrain(tools, choice) if spec.constrain is not None else None
    return name_added_tokens(constraint, tokenizer) if constraint is not None else None


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else tool


def name_added_tokens(constraint: Constraint, tokenizer: Tokenizer) -> Constraint:
    """A plugin's own grammar with added tokens by their ids: between quotes their text would stand for other tokens."""
    if constraint.kind not in ("grammar", "lark"):
        return constraint
    lines = constraint.source.split("\n")
    own = "\n".join(line for line in lines if "%json" not in line)
    ids = {json.dumps(text, ensure_ascii=False)[1:-1]: token_id for token_id, text in tokenizer.added_tokens.items() if text}
    found = {text: token_id for text, token_id in ids.items() if text in own}
    if not found:
        return constraint
    added = re.compile("(" + "|".join(map(re.escape, sorted(found, key=len, reverse=True))) + ")")

    def split(literal: re.Match[str]) -> str:
        parts = added.split(literal.group()[1:-1])
        return " ".join(f"<[{found[part]}]>" if part in found else f'"{part}"' for part in parts if part)

    named = [line if "%json" in line else _LITERAL.sub(split, line) for line in lines]
    return replace(constraint, source="\n".join(named))
