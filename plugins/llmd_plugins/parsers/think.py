"""Reasoning between `<think>` and `</think>`, which most models write, under the names of those that do."""

from __future__ import annotations

from llmd.api.v1 import ParserSpec, ThinkingParser, hookimpl


class DeepSeekR1Parser(ThinkingParser):
    """The opening tag may be missing: the prompt has it, or the model leaves it out."""

    STARTS_INSIDE = True


class Qwen3Parser(ThinkingParser):
    """Qwen 3.5 sometimes calls a tool without closing its reasoning."""

    ENDS_BEFORE = ("<tool_call>\n<function=",)


class KimiK2ThinkingParser(ThinkingParser):
    """Calls may begin without the reasoning being closed."""

    ENDS_BEFORE = ("<|tool_calls_section_begin|>",)
    needs_special_tokens = True


class MiniMaxM2ThinkingParser(ThinkingParser):
    """The opening tag is in the prompt."""

    STARTS_INSIDE = True
    ENDS_BEFORE = ("<minimax:tool_call>",)


_PARSERS: dict[str, tuple[type[ThinkingParser], str]] = {
    "think": (ThinkingParser, "any model that begins with <think>"),
    "deepseek_r1": (DeepSeekR1Parser, "DeepSeek R1, QwQ: <think> may be missing"),
    "deepseek_v3": (ThinkingParser, "DeepSeek V3.1"),
    "glm45": (ThinkingParser, "GLM 4.5 to 4.7"),
    "kimi_k2": (KimiK2ThinkingParser, "Kimi K2 Thinking"),
    "minimax_m2": (MiniMaxM2ThinkingParser, "MiniMax M2"),
    "qwen3": (Qwen3Parser, "Qwen 3 and 3.5"),
}


@hookimpl
def llmd_register_reasoning_parsers() -> list[ParserSpec]:
    """One for each family."""
    return [
        ParserSpec(name=name, summary=f"<think>…</think>: {whose}", build=parser)
        for name, (parser, whose) in _PARSERS.items()
    ]
