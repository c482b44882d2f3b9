"""Kimi K2: calls between special tokens, each with an id that has the function's name in it."""

from __future__ import annotations

from llmd.api.v1 import CallForm, HeadedCallParser, ParserSpec, ParserSteps, hookimpl, json_call, plain_name


class KimiK2Parser(HeadedCallParser):
    """Reads `functions.name:0<|tool_call_argument_begin|>{…}`. The id goes out as it came: the model wants it back."""

    SECTION, BEGIN = "<|tool_calls_section_begin|>", "<|tool_call_begin|>"
    SEPARATOR = "<|tool_call_argument_begin|>"
    END = "<|tool_call_end|>"
    OPENS = (SECTION, BEGIN)
    CLOSES = (END, "<|tool_calls_section_end|>")

    def _read_head(self, head: str) -> ParserSteps[tuple[str, str | None]]:
        yield from self._skip_space()
        name, _, index = head.removeprefix("functions.").rpartition(":")
        return (name, head) if name and index.isdigit() else (head.removeprefix("functions."), None)


FORM = CallForm(
    call=json_call(
        f"{KimiK2Parser.BEGIN}functions.{{name}}:{{number}}{KimiK2Parser.SEPARATOR}", KimiK2Parser.END, name=plain_name
    ),
    begin=KimiK2Parser.SECTION,
    end="<|tool_calls_section_end|>",
    opens=KimiK2Parser.OPENS,
    is_numbered=True,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Kimi K2 and its successors."""
    summary = "<|tool_call_begin|>functions.name:0 …: Kimi K2"
    return [ParserSpec(name="kimi_k2", summary=summary, build=KimiK2Parser, form=FORM)]
