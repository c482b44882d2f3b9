"""Chooses the parsers of a model by what its chat template writes, most telling marks first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llmd.api.v1 import hookimpl


class _Mark(NamedTuple):
    """If the template has all of `present` and none of `absent`, its parser is `name`."""

    name: str
    present: tuple[str, ...]
    absent: tuple[str, ...] = ()


_TOOLS = (
    _Mark("openai", ("<|channel|>", "<|message|>")),
    _Mark("deepseek_v32", ("｜DSML｜", "invoke")),
    _Mark("deepseek_v3", ("<｜tool▁call▁begin｜>", "```json")),
    _Mark("deepseek_v31", ("<｜tool▁call▁begin｜>",)),
    _Mark("kimi_k2", ("<|tool_call_argument_begin|>",)),
    _Mark("kimi_k2", ("<|tool_calls_section_begin|>",)),
    _Mark("minimax_m2", ("<minimax:tool_call>",)),
    _Mark("glm45", ("<arg_key>", "<tool_call>")),
    _Mark("qwen3_coder", ("<function=", "<parameter=")),
    _Mark("internlm", ("<|action_start|>",)),
    _Mark("mistral", ("[TOOL_CALLS]",)),
    _Mark("phi4_mini", ("functools",)),
    _Mark("phi4_mini", ("<|/tool_call|>",)),
    _Mark("phi4_mini", ("<|tool|>", "<|/tool|>")),
    _Mark("granite", ("<|start_of_role|>",), absent=("</tool_call>",)),
    _Mark("hermes", ("<tool_call>", "</tool_call>")),
    _Mark("llama4_json", ("<|header_start|>", '"parameters"')),
    _Mark("llama4_pythonic", ("<|header_start|>",)),
    _Mark("llama4_pythonic", ("<|python_start|>",)),
    _Mark("llama3_json", ("<|start_header_id|>", '"parameters"')),
    _Mark("llama3_json", ("<|python_tag|>",)),
    _Mark("jamba", ("<tool_calls>", "<|bom|>")),
    _Mark("minimax", ("<tool_calls>", "<beginning_of_sentence>")),
    _Mark("jamba", ("<tool_calls>",)),
)
_REASONING = (
    _Mark("openai_gptoss", ("<|channel|>", "<|message|>")),
    _Mark("mistral", ("[THINK]",)),
    _Mark("granite", ("Here is my thought process:",)),
    _Mark("granite", ("<|start_of_role|>", "<think>")),
    _Mark("minimax_m2", ("<minimax:tool_call>", "<think>")),
    _Mark("kimi_k2", ("<|tool_calls_section_begin|>", "<think>")),
    _Mark("glm45", ("<arg_key>", "<think>")),
    _Mark("deepseek_v3", ("｜DSML｜", "</think>")),
    _Mark("deepseek_v3", ("<｜Assistant｜>", "</think>", "thinking")),
    _Mark("deepseek_r1", ("<｜Assistant｜>", "</think>")),
    _Mark("qwen3", ("<|im_start|>", "</think>")),
    _Mark("think", ("<think>",)),
    _Mark("think", ("</think>",)),
)
# models whose template says nothing of it, by model_type: (tools, reasoning)
_BY_TYPE = {"gpt_oss": ("openai", "openai_gptoss"), "kimi_k2": ("kimi_k2", None), "minimax_m2": ("minimax_m2", "minimax_m2")}


def _named(marks: tuple[_Mark, ...], template: str) -> str | None:
    for mark in marks:
        if all(text in template for text in mark.present) and not any(text in template for text in mark.absent):
            return mark.name
    return None


@hookimpl
def llmd_select_parsers(model: Mapping[str, Any]) -> tuple[str | None, str | None] | None:
    """Look at the template, then at the model's type."""
    template = str(model.get("chat_template") or "")
    tools, reasoning = _named(_TOOLS, template), _named(_REASONING, template)
    if (tools, reasoning) == (None, None):
        return _BY_TYPE.get(str(model.get("model_type") or ""))
    return tools, reasoning
