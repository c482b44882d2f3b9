"""A request as the conversation that every format shares: its items, its prompt, its params."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import (
    ChatCall,
    InvalidParams,
    InvalidRequest,
    SamplingParams,
    StructuredOutputsParams,
    open_chat,
    render_conversation,
    time_limit_s,
)
from llmd_plugins.responses.items import chat_tool, messages_of, names_of
from llmd_plugins.responses.protocol import CountRequest, PromptFields, ResponseRequest

if TYPE_CHECKING:
    from llmd.api.v1 import ChatStream, ModelService, Receipt, ServerContext
    from llmd_plugins.responses.store import Store

# where the shared call speaks of a field by another name than this API
_RENAMED = {"structured_outputs": "text.format.schema", "max_tokens": "max_output_tokens", "prompt": "input"}
# what goes to the sampler under its own name
_SAMPLING = (
    "temperature", "top_p", "top_k", "seed", "repetition_penalty", "ignore_eos", "skip_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip


def all_items(
    context: ServerContext, store: Store, key: str, body: ResponseRequest | CountRequest
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The conversation's items, and those of them that are this request's own; raises for references to nothing."""
    own = [
        store.item(key, item["id"], f"input[{index}].id") if item["type"] == "item_reference" else item
        for index, item in enumerate(body.input)
    ]
    items = [*store.conversation(key, body.previous_response_id), *own]
    if len(items) > (limit := context.config.limits.max_messages):
        raise InvalidRequest(f"input must have at most {limit} items with those before it, got {len(items)}", param="input")
    return items, own


async def open_response(
    context: ServerContext, service: ModelService, body: ResponseRequest, receipt: Receipt, items: list[dict[str, Any]]
) -> ChatStream:
    """Queue it; read and close the stream. Raises InvalidRequest with this API's names of fields."""
    options: dict[str, Any] = {
        "request_id": f"resp-{receipt.request_id}-{id(body):x}",
        "key": receipt.key,
        "priority": body.priority,
        "cache_salt": body.cache_salt,
        "timeout_s": time_limit_s(context.config),
        "adapter": context.adapter(body.model),
    }
    try:
        call = chat_call(body, items, _params(context, service, body))
        if body.truncation == "auto":
            call = await truncated(service, call)
        try:
            return await open_chat(service, call, **options)
        except InvalidRequest as error:
            if (error.param, error.code) != ("max_tokens", "context_length_exceeded"):
                raise
        # clients ask for more output than small contexts hold: they get what is left
        return await open_chat(service, replace(call, params=replace(call.params, max_tokens=None)), **options)
    except InvalidRequest as error:
        if (renamed := _RENAMED.get(error.param or "")) is None:
            raise
        words = error.message if error.param == "prompt" else error.message.replace(error.param or "", renamed, 1)
        raise InvalidRequest(words, param=renamed, code=error.code) from None


def _params(context: ServerContext, service: ModelService, body: ResponseRequest) -> SamplingParams:
    limits = context.config.limits
    if limits.max_output_tokens is not None and (body.max_output_tokens or 0) > limits.max_output_tokens:
        raise InvalidParams("max_output_tokens", body.max_output_tokens, f"at most {limits.max_output_tokens}")
    if (body.top_logprobs or 0) > limits.max_logprobs:
        raise InvalidParams("top_logprobs", body.top_logprobs, f"at most {limits.max_logprobs}")
    overrides: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    overrides |= {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if body.stop:
        overrides["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.wants_logprobs:
        overrides["logprobs"] = body.top_logprobs or 0
    form = body.text.format if body.text is not None else None
    if form is not None and form.type == "json_schema":
        overrides["structured_outputs"] = StructuredOutputsParams(json=form.schema_)
    elif form is not None and form.type == "json_object":
        overrides["structured_outputs"] = StructuredOutputsParams(json_object=True)
    return service.sampling_params(overrides)


def chat_call(body: PromptFields, items: list[dict[str, Any]], params: SamplingParams) -> ChatCall:
    """The conversation; of tools only those that may be called are shown to the model."""
    choice, tools = body.tool_choice, body.tools or []
    if isinstance(choice, dict):
        named = names_of(choice)
        is_of_many = choice["type"] == "allowed_tools"
        tools = [tool for tool in tools if tool["name"] in named] if is_of_many else tools
        choice = choice["mode"] if is_of_many else choice["name"]
    return ChatCall(
        messages=messages_of(items, body.instructions),
        params=params,
        tools=[chat_tool(tool) for tool in tools] or None,
        tool_choice=choice if tools else None,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
    )


async def truncated(service: ModelService, call: ChatCall) -> ChatCall:
    """The call without the oldest turns that the context cannot hold; system messages and the last turn stay."""
    kept = [message for message in call.messages if message["role"] in ("system", "developer")]
    rest = [message for message in call.messages if message["role"] not in ("system", "developer")]
    starts = [index for index, message in enumerate(rest) if message["role"] == "user"]
    room = service.max_model_len - min(call.params.max_tokens or 1, service.max_model_len // 2)

    async def fits(candidate: ChatCall) -> bool:
        prompt = render_conversation(service, candidate)
        return len(await service.tokenizer.encode_async(prompt, add_special_tokens=False)) <= room

    shorter = [replace(call, messages=[*kept, *rest[start:]]) for start in starts]
    if not shorter or await fits(call):
        return call
    low, high = 0, len(shorter) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await fits(shorter[middle]) else (middle + 1, high)
    return shorter[low]
