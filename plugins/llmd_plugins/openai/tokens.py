"""POST /tokenize and /detokenize, GET /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from llmd.api.v1 import (
    ChatCall,
    InvalidParams,
    SamplingParams,
    json_response,
    read_json_object,
    receipt_of,
    render_conversation,
)
from llmd_plugins.openai.call import check_length
from llmd_plugins.openai.chat import template_fields
from llmd_plugins.openai.fields import parse
from llmd_plugins.openai.protocol import DetokenizeRequest, TokenizeChat, TokenizePrompt

if TYPE_CHECKING:
    from llmd.api.v1 import ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def tokenize(context: ServerContext) -> Handler:
    """The handler: a body with `messages` is a conversation, any other a text."""

    async def handle(request: web.Request) -> web.StreamResponse:
        given = await read_json_object(request)
        check_length("messages", given.get("messages"), context.config.limits.max_messages)
        body = parse(TokenizeChat, given) if "messages" in given else parse(TokenizePrompt, given)
        service = context.service(body.model)
        receipt_of(request).model = service.names[0]
        if isinstance(body, TokenizeChat):
            conversation = ChatCall(**template_fields(context, body), params=SamplingParams())
            text = render_conversation(service, conversation)
        else:
            text = body.prompt
        token_ids = await service.tokenizer.encode_async(text, add_special_tokens=body.add_special_tokens)
        names = [service.tokenizer.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
        return json_response(
            {"count": len(token_ids), "max_model_len": service.max_model_len, "tokens": token_ids, "token_strs": names}
        )

    return handle


def detokenize(context: ServerContext) -> Handler:
    """The handler."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = parse(DetokenizeRequest, await read_json_object(request))
        service = context.service(body.model)
        receipt_of(request).model = service.names[0]
        size = service.tokenizer.vocab_size
        if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < size:
            index = next(index for index, token_id in enumerate(body.tokens) if not 0 <= token_id < size)
            raise InvalidParams(f"tokens[{index}]", body.tokens[index], f"between 0 and {size - 1}")
        decode = partial(service.tokenizer.decode, body.tokens, skip_special_tokens=False)
        text = await service.tokenizer.off_loop(len(body.tokens), decode)
        return json_response({"prompt": text})

    return handle


def tokenizer_info(context: ServerContext) -> Handler:
    """The handler: what tokenizer_config.json says, and the chat template as it is used."""

    async def handle(request: web.Request) -> web.StreamResponse:
        service = context.service(request.query.get("model"))
        receipt_of(request).model = service.names[0]
        tokenizer = service.tokenizer
        names = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
        texts = {name: None if token_id is None else tokenizer.token_text(token_id) for name, token_id in names.items()}
        template = service.chat_template.templates.get("default")
        return json_response({**tokenizer.config, **texts, "chat_template": template})

    return handle
