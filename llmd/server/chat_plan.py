"""From a ChatCall to a plan: the prompt, what constrains the answer, and which parsers read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmd.engine.params import SamplingParams
from llmd.engine.step import FinishReason
from llmd.errors import InvalidRequest
from llmd.server.tool_plan import plan_tools, tool_choice_of
from llmd.text.parsers import Parser, ReplyParser, ThinkingParser
from llmd.text.structured import Constraint

if TYPE_CHECKING:
    from llmd.server.chat_types import ChatCall
    from llmd.server.generate import ModelService
    from llmd.text.stream import TextDelta

# What the template gets from the request itself: chat_template_kwargs may not replace them.
RESERVED = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "self", "range"]
)


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a thinking leg is ended: by its closing tags, or after `budget` tokens by `closing`, said for the model."""

    closes: tuple[str, ...]
    closing: str
    skipping: str  # behind the prompt: there is nothing to think of
    opens: tuple[str, ...]
    budget: int | None
    changes: Mapping[str, Any]  # of SamplingParams

    def is_closed_by(self, delta: TextDelta) -> bool:
        """Whether the model itself closed its thinking."""
        return delta.finish_reason is FinishReason.STOP and delta.stop_reason in self.closes

    def is_opening(self, text: str) -> bool:
        """Whether the text is the beginning of an opening tag."""
        return any(tag.startswith(text.strip()) for tag in self.opens)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a call is served. `prompt_ids` is set where the prompt was cut."""

    prompt: str
    prompt_ids: Sequence[int] | None
    params: SamplingParams
    constraint: Constraint | None
    thinking: Thinking | None
    make_reasoning: Callable[[], Parser] | None
    make_tools: Callable[[], Parser] | None
    add_special_tokens: bool
    include_reasoning: bool
    parallel: bool

    @property
    def is_plain(self) -> bool:
        """Whether the text is the content as it is."""
        return self.make_reasoning is None and self.make_tools is None and self.thinking is None

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar holds the answer."""
        return self.constraint is not None or self.params.structured_outputs is not None

    def parser(self, *, is_thinking: bool, after_thinking: bool) -> Parser | None:
        """The parser of one leg of one choice."""
        if is_thinking:
            return self.make_reasoning() if self.make_reasoning is not None else None
        is_answer_only = self.thinking is not None or after_thinking
        reasoning = self.make_reasoning() if self.make_reasoning is not None and not is_answer_only else None
        tools = self.make_tools() if self.make_tools is not None else None
        return ReplyParser(reasoning, tools) if reasoning is not None or tools is not None else None


async def make_plan(service: ModelService, call: ChatCall) -> Plan:
    """Check what the call asks of tools and thinking, and render its prompt. Raises InvalidRequest."""
    choice = tool_choice_of(call)
    make_tools, constraint = plan_tools(service, call, choice)
    if constraint is not None and call.params.structured_outputs is not None:  # the other must hold the whole answer
        raise InvalidRequest(f"tool_choice {choice!r} cannot be combined with structured output", param="tool_choice")
    prompt = render_conversation(service, call)
    make_reasoning, reasoner = None, None
    if (spec := service.parsers.reasoning) is not None:
        make_reasoning = _maker(spec.build, prompt)
        reasoner = make_reasoning()
    is_constrained = constraint is not None or call.params.structured_outputs is not None
    thinking = _thinking(call, reasoner, prompt, is_constrained)
    if thinking is not None and thinking.budget == 0:
        prompt, thinking = prompt + thinking.skipping, None
        make_reasoning = _maker(spec.build, prompt) if spec is not None else None
    if is_constrained and thinking is None:
        make_reasoning = None  # the grammar begins with the first token
    return Plan(
        prompt,
        await _cut(service, call, prompt),
        _with_special_tokens(call.params, make_reasoning, make_tools),
        constraint,
        thinking,
        make_reasoning,
        make_tools,
        call.add_special_tokens,
        call.include_reasoning,
        call.parallel_tool_calls,
    )


def _maker(build: Callable[..., Parser], *arguments: Any) -> Callable[[], Parser]:
    return lambda: build(*arguments)


def _with_special_tokens(params: SamplingParams, *makers: Callable[[], Parser] | None) -> SamplingParams:
    """Parsers may have to see tags that are special tokens."""
    if params.skip_special_tokens and any(make is not None and make().needs_special_tokens for make in makers):
        return replace(params, skip_special_tokens=False)
    return params


# --- the prompt


def render_conversation(service: ModelService, call: ChatCall) -> str:
    """The prompt that the model's template, or the call's own, makes of the conversation. Raises InvalidRequest."""
    adds_prompt = call.add_generation_prompt
    arguments: dict[str, Any] = {
        **_template_arguments(call),
        "tools": call.tools,
        "documents": call.documents,
        "add_generation_prompt": not call.continue_final_message if adds_prompt is None else adds_prompt,
        "continue_final_message": call.continue_final_message,
    }
    if call.chat_template is not None:
        arguments["chat_template"] = call.chat_template
    return service.render_chat(_messages(service, call), **arguments)


def _messages(service: ModelService, call: ChatCall) -> Sequence[Mapping[str, Any]]:
    """OpenAI's `developer` is `system` for a model whose templates have never heard of it."""
    templates = (call.chat_template or "", *service.chat_template.templates.values())
    if any("developer" in template for template in templates):
        return call.messages
    return [{**message, "role": "system"} if message["role"] == "developer" else message for message in call.messages]


def _template_arguments(call: ChatCall) -> dict[str, Any]:
    """The request's own arguments, over what its reasoning_effort means to templates that know only on and off."""
    given = call.chat_template_kwargs or {}
    if taken := sorted(RESERVED & given.keys()):
        path = f"chat_template_kwargs.{taken[0]}"
        raise InvalidRequest(f"{path} is a field of the request itself", param=path)
    if (effort := call.reasoning_effort) is None:
        return dict(given)
    thinks = effort != "none"
    told = {"enable_thinking": thinks, "thinking": thinks, **({"reasoning_effort": effort} if thinks else {})}
    return {**told, **given}


async def _cut(service: ModelService, call: ChatCall, prompt: str) -> Sequence[int] | None:
    limit = call.truncate_prompt_tokens
    if limit is None:
        return None
    token_ids = await service.tokenizer.encode_async(prompt, add_special_tokens=call.add_special_tokens)
    return token_ids[-(limit if limit > 0 else service.max_model_len - 1) :]


# --- thinking


def _thinking(call: ChatCall, reasoner: Parser | None, prompt: str, is_constrained: bool) -> Thinking | None:
    """Whether the thinking has a leg of its own, and how it ends."""
    budget = call.thinking_token_budget
    if budget is None and not is_constrained:
        return None
    if not isinstance(reasoner, ThinkingParser):
        if budget is None:
            return None
        raise InvalidRequest(
            "thinking_token_budget is not served for this model: it has no reasoning parser with a closing tag "
            "(models.reasoning_parser)",
            param="thinking_token_budget",
            code="unsupported_parameter",
        )
    closes = reasoner.CLOSES
    if prompt.rstrip().endswith(closes):
        return None  # the template has closed it already
    params = call.params
    limits = [limit for limit in (budget, params.max_tokens) if limit is not None]
    changes: dict[str, Any] = {
        "stop": (*params.stop, *closes),
        "skip_special_tokens": False,
        "structured_outputs": None,
        "min_tokens": 0,
    }
    if limits and min(limits) > 0:
        changes["max_tokens"] = min(limits)
    closing, opens = f"\n{closes[0]}\n\n", reasoner.OPENS
    is_open = not opens or prompt.rstrip().endswith(opens)
    return Thinking(closes, closing, closing if is_open else f"{opens[0]}\n{closing}", opens, budget, changes)
