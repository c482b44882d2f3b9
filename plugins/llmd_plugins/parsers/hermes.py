"""Hermes, Qwen 2.5 and Qwen 3: each call a JSON object between `<tool_call>` and `</tool_call>`."""

from __future__ import annotations

from llmd.api.v1 import CallForm, JsonCallParser, ParserSpec, hookimpl, json_call


class HermesParser(JsonCallParser):
    """Reads `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

    OPENS = ("<tool_call>",)
    CLOSES = ("</tool_call>",)


# calls on lines of their own, as chat templates write them
FORM = CallForm(
    call=json_call('{"name": {name}, "arguments": ', "}"),
    begin="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    end="\n</tool_call>",
    opens=HermesParser.OPENS,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """The most common format."""
    summary = "<tool_call>{JSON}</tool_call>: Hermes, Qwen 2.5, Qwen 3, Granite 4"
    return [ParserSpec(name="hermes", summary=summary, build=HermesParser, form=FORM)]
