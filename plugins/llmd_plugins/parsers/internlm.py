"""InternLM 2.5 and 3: a JSON object between `<|action_start|><|plugin|>` and `<|action_end|>`."""

from __future__ import annotations

from llmd.api.v1 import CallForm, JsonCallParser, ParserSpec, hookimpl, json_call


class InternLmParser(JsonCallParser):
    """Reads `<|action_start|><|plugin|>{"name": …, "parameters": {…}}<|action_end|>`."""

    OPENS = ("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>")
    CLOSES = ("<|action_end|>",)


FORM = CallForm(
    call=json_call('{"name": {name}, "parameters": ', "}"),
    begin="<|action_start|><|plugin|>",
    between="<|action_end|>\n<|action_start|><|plugin|>",
    end="<|action_end|>",
    opens=InternLmParser.OPENS,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """InternLM."""
    summary = "<|action_start|><|plugin|>{JSON}: InternLM"
    return [ParserSpec(name="internlm", summary=summary, build=InternLmParser, form=FORM)]
