"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.api.v1 import ChatCall, InvalidParams, InvalidRequest, json_response, read_json_object
from llmd_plugins.openai.beams import search_chat
from llmd_plugins.openai.call import Call, check_length, sampling_params
from llmd_plugins.openai.chat_answer import ChatFrames, choice_of
from llmd_plugins.openai.fields import parse
from llmd_plugins.openai.logprobs import LogprobFormat
from llmd_plugins.openai.protocol import ChatRequest, ChatTemplateFields

if TYPE_CHECKING:
    from llmd.api.v1 import ChatAnswer, ModelService, SamplingParams, ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def chat_completions(context: ServerContext) -> Handler:
    """The handler."""

    async def handle(request: web.Request) -> web.StreamResponse:
        given = await read_json_object(request)
        check_length("messages", given.get("messages"), context.config.limits.max_messages)
        body = parse(ChatRequest, given)
        call = Call(context, request, body, "chatcmpl")
        params = _sampling_params(context, call.service, body)
        conversation = _conversation(context, body, params)
        if body.use_beam_search:
            found = await search_chat(call, conversation, body.max_completion_tokens or body.max_tokens)
            return json_response(_answer(call, body, found))
        await call.start_chat(conversation)
        if body.stream:
            return await call.stream(ChatFrames(call, body, _logprobs(call, body)))
        return json_response(_answer(call, body, await call.collect_chat()))

    return handle


def _sampling_params(context: ServerContext, service: ModelService, body: ChatRequest) -> SamplingParams:
    """Unlike a completion, an answer without max_tokens may fill the context."""
    changes: dict[str, Any] = {"max_tokens": body.max_tokens}
    if body.max_completion_tokens is not None:
        changes["max_tokens"] = body.max_completion_tokens
    if body.logprobs:
        changes["logprobs"] = body.top_logprobs or 0
        if changes["logprobs"] > (limit := context.config.limits.max_logprobs):
            raise InvalidParams("top_logprobs", body.top_logprobs, f"at most {limit}")
    return sampling_params(service, context.config.limits, body, **changes)


# --- the conversation


def template_fields(context: ServerContext, body: ChatTemplateFields) -> dict[str, Any]:
    """What of a ChatCall says how the conversation becomes a prompt."""
    if body.chat_template is not None and not context.settings("openai").trust_request_chat_template:
        message = "chat_template is not allowed in requests ([plugins.openai] trust_request_chat_template)"
        raise InvalidRequest(message, param="chat_template", code="unsupported_parameter")
    return {
        "messages": body.messages,
        "tools": body.tools,
        "documents": body.documents,
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": bool(body.continue_final_message),
        "chat_template": body.chat_template,
        "chat_template_kwargs": body.chat_template_kwargs,
    }


def _conversation(context: ServerContext, body: ChatRequest, params: SamplingParams) -> ChatCall:
    fields = template_fields(context, body)
    fields["tools"] = body.tools or body.functions
    return ChatCall(
        **fields,
        params=params,
        tool_choice=body.function_call if body.functions else body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False and not body.functions,
        include_reasoning=body.include_reasoning is not False,
        thinking_token_budget=body.thinking_token_budget,
        reasoning_effort=body.reasoning_effort,
        add_special_tokens=bool(body.add_special_tokens),
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )


# --- the answer


def _logprobs(call: Call, body: ChatRequest) -> LogprobFormat | None:
    if not body.logprobs:
        return None
    return LogprobFormat(call.service, body.top_logprobs or 0, as_token_ids=bool(body.return_tokens_as_token_ids))


def _answer(call: Call, body: ChatRequest, choices: list[ChatAnswer]) -> dict[str, Any]:
    logprobs = _logprobs(call, body)
    answer: dict[str, Any] = {
        "id": call.id,
        "object": "chat.completion",
        "created": call.created,
        "model": call.model,
        "choices": [choice_of(choice, logprobs, body) for choice in choices],
        "usage": call.usage(),
        "system_fingerprint": None,
    }
    if body.prompt_logprobs is not None:
        form = LogprobFormat(call.service, body.prompt_logprobs)
        answer["prompt_logprobs"] = form.prompt(call.prompt_logprobs[0])
    if body.return_token_ids:
        answer["prompt_token_ids"] = list(call.streams[0].request.prompt.token_ids)
    return answer
