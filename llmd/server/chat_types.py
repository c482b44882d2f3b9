"""What a conversation asks for and what comes back, in no wire format's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmd.engine.params import SamplingParams
from llmd.engine.step import TokenLogprobs
from llmd.text.parsers import ToolCallDelta

TOOL_CALLS = "tool_calls"  # how a choice ended that called tools


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """What a conversation asks for, whatever it looked like on the wire.

    `tool_choice` is "none", "auto", "required", or the name of the function that must be called; None is "auto" with
    tools and "none" without. `tools` are OpenAI's: {"type": "function", "function": {name, description, parameters}}.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    thinking_token_budget: int | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_special_tokens: bool = False  # templates write them
    truncate_prompt_tokens: int | None = None  # the last so many; -1: as many as fit beside one output token


@dataclass(slots=True)
class ChatDelta:
    """News of one choice: at most one of content, reasoning and tool_call is set. The last has its finish_reason.

    finish_reason is one of FinishReason's values or "tool_calls"; `error` says what went wrong with "error" and "abort".
    """

    index: int
    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None
    token_ids: Sequence[int] = ()
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        """The content, as TextDelta calls it."""
        return self.content


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One whole call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class ChatAnswer:
    """One whole choice."""

    index: int
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str = "stop"
    stop_reason: str | int | None = None
    error: str | None = None


def add_news(answers: list[ChatAnswer], deltas: list[ChatDelta]) -> None:
    """Put news to what is there already."""
    for delta in deltas:
        answer = answers[delta.index]
        answer.content += delta.content
        answer.reasoning += delta.reasoning
        answer.token_ids += delta.token_ids
        if delta.logprobs is not None:
            answer.logprobs = [*(answer.logprobs or ()), *delta.logprobs]
        if delta.prompt_logprobs is not None:
            answer.prompt_logprobs = [*(answer.prompt_logprobs or ()), *delta.prompt_logprobs]
        if delta.tool_call is not None:
            add_call(answer.tool_calls, delta.tool_call)
        if delta.finish_reason is not None:
            answer.finish_reason, answer.stop_reason, answer.error = delta.finish_reason, delta.stop_reason, delta.error


def add_call(calls: list[ToolCall], piece: ToolCallDelta) -> None:
    """Put a piece of a call to what is there already."""
    while len(calls) <= piece.index:
        calls.append(ToolCall("", "", ""))
    call = calls[piece.index]
    calls[piece.index] = ToolCall(piece.id or call.id, piece.name or call.name, call.arguments + piece.arguments)
