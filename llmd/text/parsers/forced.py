"""Grammars that force calls, in one call: for formats whose arguments are a JSON object between two texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmd.text.parsers.forms import CallForm, Function, GrammarWriter

if TYPE_CHECKING:
    from llmd.text.structured import Constraint

_HERE = "\0arguments\0"


def forced_calls(
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    *,
    call: Callable[[str, str], Sequence[str]],
    begin: str = "",
    between: str = "",
    end: str = "",
) -> Constraint | None:
    """A Lark grammar for one call of the function `choice`, or ("required") for one or more calls of any.

    `call(name, arguments)` gives the texts of a call, among them `arguments` unchanged, where these stand. None without
    tools to choose from.
    """

    def terms(writer: GrammarWriter, function: Function, number: int) -> str:
        texts = call(function.name, _HERE)
        arguments = writer.json({"type": "object", **function.parameters})
        return " ".join(arguments if text == _HERE else writer.text(text) for text in texts)

    return CallForm(call=terms, begin=begin, between=between, end=end).constraint(tools, choice)
