"""Llama 3.1 to 3.3: the answer is a JSON object with name and parameters, `<|python_tag|>` in front of it or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmd.api.v1 import BareJsonCallParser, Constraint, ParserSpec, forced_calls, hookimpl


class Llama3JsonParser(BareJsonCallParser):
    """Reads `{"name": …, "parameters": {…}}`; several are divided by semicolons."""

    OPENS = ("<|python_tag|>", "\n{")


class Llama4JsonParser(BareJsonCallParser):
    """The same between tags."""

    OPENS = ("<|python_start|>", "<|python_tag|>", "\n{")
    CLOSES = ("<|python_end|>",)


def constrain(tools: Sequence[Mapping[str, Any]], choice: str) -> Constraint | None:
    """One call without a tag, or several divided by semicolons."""
    return forced_calls(
        tools,
        choice,
        call=lambda name, arguments: ['{"name": ' + json.dumps(name) + ', "parameters": ', arguments, "}"],
        between="; ",
    )


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Llama 3, and Llama 4 where its template asks for JSON."""
    three, four = "Llama 3: <|python_tag|>{JSON}, tag or not", "Llama 4: <|python_start|>{JSON}, tag or not"
    return [
        ParserSpec(name="llama3_json", summary=three, build=Llama3JsonParser, constrain=constrain),
        ParserSpec(name="llama4_json", summary=four, build=Llama4JsonParser, constrain=constrain),
    ]
