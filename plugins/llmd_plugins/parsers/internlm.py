"""InternLM 2.5 and 3: a JSON object between `<|action_start|><|plugin|>` and `<|action_end|>`."""

from __future__ import annotations

from llmd.api.v1 import JsonCallParser, ParserSpec, hookimpl


class InternLmParser(JsonCallParser):
    """Reads `<|action_start|><|plugin|>{"name": …, "parameters": {…}}<|action_end|>`."""

    OPENS = ("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>")
    CLOSES = ("<|action_end|>",)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """InternLM."""
    return [ParserSpec(name="internlm", summary="<|action_start|><|plugin|>{JSON}: InternLM", build=InternLmParser)]
