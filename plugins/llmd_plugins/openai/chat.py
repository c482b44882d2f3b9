"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.api.v1 import InvalidParams, InvalidRequest, json_response, read_json_object
from llmd_plugins.openai.call import Call, check_length, sampling_params
from llmd_plugins.openai.fields import parse
from llmd_plugins.openai.frames import Frames, ending
from llmd_plugins.openai.logprobs import LogprobFormat
from llmd_plugins.openai.protocol import ChatRequest, ChatTemplateFields

if TYPE_CHECKING:
    from llmd.api.v1 import ModelService, SamplingParams, ServerContext, TextDelta

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# What render_chat takes by name: template arguments of a request may not replace them.
_RESERVED = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "self", "range",
}  # fmt: skip


def chat_completions(context: ServerContext) -> Handler:
    """The handler."""

    async def handle(request: web.Request) -> web.StreamResponse:
        given = await read_json_object(request)
        check_length("messages", given.get("messages"), context.config.limits.max_messages)
        body = parse(ChatRequest, given)
        call = Call(context, request, body, "chatcmpl")
        _check_tool_choice(body)
        params = _sampling_params(context, call.service, body)
        call.service.engine.check_admission(0, params.n)
        prompt = render(context, call.service, body)
        await call.start([prompt], params, bool(body.add_special_tokens))
        return await _answer(call, body)

    return handle


def _check_tool_choice(body: ChatRequest) -> None:
    """Tool calls are found by a parser; without one, tools can only be shown to the model."""
    if not body.tools or body.tool_choice == "none":
        return
    raise InvalidRequest(
        f"tool_choice {body.tool_choice or 'auto'} needs a tool parser and none is configured for this model "
        "(tool_call_parser); with tool_choice 'none' the tools are only shown to the model",
        param="tool_choice",
        code="unsupported_parameter",
    )


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


# --- the prompt


def render(context: ServerContext, service: ModelService, body: ChatTemplateFields) -> str:
    """The prompt that the model's template, or the request's own where that is allowed, makes of a conversation."""
    adds_prompt = body.add_generation_prompt
    arguments: dict[str, Any] = {
        **_template_arguments(body),
        "tools": body.tools,
        "documents": body.documents,
        "add_generation_prompt": not body.continue_final_message if adds_prompt is None else adds_prompt,
        "continue_final_message": bool(body.continue_final_message),
    }
    if body.chat_template is not None:
        arguments["chat_template"] = _allowed_template(context, body.chat_template)
    return service.render_chat(_messages(service, body), **arguments)


def _messages(service: ModelService, body: ChatTemplateFields) -> list[dict[str, Any]]:
    """OpenAI's `developer` is `system` for a model whose templates have never heard of it."""
    templates = (body.chat_template or "", *service.chat_template.templates.values())
    if any("developer" in template for template in templates):
        return body.messages
    return [{**message, "role": "system"} if message["role"] == "developer" else message for message in body.messages]


def _template_arguments(body: ChatTemplateFields) -> dict[str, Any]:
    arguments = body.chat_template_kwargs or {}
    if taken := sorted(_RESERVED & arguments.keys()):
        path = f"chat_template_kwargs.{taken[0]}"
        raise InvalidRequest(f"{path} is a field of the request itself", param=path)
    return arguments


def _allowed_template(context: ServerContext, template: str) -> str:
    if not context.settings("openai").trust_request_chat_template:
        message = "chat_template is not allowed in requests ([plugins.openai] trust_request_chat_template)"
        raise InvalidRequest(message, param="chat_template", code="unsupported_parameter")
    return template


# --- the answer


async def _answer(call: Call, body: ChatRequest) -> web.StreamResponse:
    logprobs = None
    if body.logprobs:
        as_ids = bool(body.return_tokens_as_token_ids)
        logprobs = LogprobFormat(call.service, body.top_logprobs or 0, as_token_ids=as_ids)
    if body.stream:
        return await call.stream(ChatFrames(call, logprobs))
    choices = (await call.collect())[0]
    answer: dict[str, Any] = {
        "id": call.id,
        "object": "chat.completion",
        "created": call.created,
        "model": call.model,
        "choices": [_choice(index, delta, logprobs, body) for index, delta in enumerate(choices)],
        "usage": call.usage(),
        "system_fingerprint": None,
    }
    if body.prompt_logprobs is not None:
        form = LogprobFormat(call.service, body.prompt_logprobs)
        answer["prompt_logprobs"] = form.prompt(call.prompt_logprobs[0])
    if body.return_token_ids:
        answer["prompt_token_ids"] = list(call.streams[0].request.prompt.token_ids)
    return json_response(answer)


def _choice(index: int, delta: TextDelta, logprobs: LogprobFormat | None, body: ChatRequest) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": delta.text, "refusal": None},
        "logprobs": logprobs.chat(delta.logprobs or ()) if logprobs is not None else None,
        **ending(delta),
    }
    if body.return_token_ids:
        answer["token_ids"] = list(delta.token_ids)
    return answer


class ChatFrames(Frames):
    """Events of a chat stream; the first one of each choice tells the role."""

    OBJECT = "chat.completion.chunk"
    TEXT_HEAD = b',"delta":{"content":'
    TEXT_TAIL = b'},"logprobs":null,"finish_reason":null}'

    def choice(self, index: int, prompt_index: int, delta: TextDelta, is_first: bool) -> dict[str, Any]:
        """`delta` holds what is new of the message."""
        news: dict[str, Any] = {"role": "assistant", "content": delta.text} if is_first else {}
        if delta.text:
            news["content"] = delta.text
        logprobs = self.logprobs.chat(delta.logprobs) if self.logprobs is not None and delta.logprobs else None
        answer = {"index": index, "delta": news, "logprobs": logprobs, **ending(delta)}
        if self.wants_token_ids:
            answer["token_ids"] = list(delta.token_ids)
        return answer

    def extra(self, prompt_index: int, is_first: bool) -> dict[str, Any]:
        """The prompt's token ids, once, where they were asked for."""
        if is_first and self.wants_token_ids:
            return {"prompt_token_ids": list(self.call.streams[0].request.prompt.token_ids)}
        return {}
