"""litellm: chat, streams, tools, completions, Anthropic's messages, and errors as its own exceptions."""

import asyncio

import litellm
from common import ASK, KEY, TOOL, URL, tell

WHERE = {"api_base": f"{URL}/v1", "api_key": KEY}
CHAT = {"model": "openai/demo", "messages": ASK, "temperature": 0, "max_tokens": 24, **WHERE}


async def streamed():
    """The text of an asynchronous stream, and its usage."""
    stream = await litellm.acompletion(**CHAT, stream=True, stream_options={"include_usage": True})
    text, usage = "", None
    async for chunk in stream:
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        usage = getattr(chunk, "usage", None) or usage
    return text, usage.completion_tokens


def error_of(**changes):
    """The class of the exception that a call ends with."""
    try:
        litellm.completion(**{**CHAT, **changes}, num_retries=0)
    except Exception as error:  # noqa: BLE001 - its class is what is told
        return type(error).__name__
    return None


whole = litellm.completion(**CHAT)
sync = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**CHAT, stream=True))
text, num_tokens = asyncio.run(streamed())
call = (
    litellm.completion(**CHAT | {"max_tokens": 200}, tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0]
)
plain = litellm.text_completion(model="text-completion-openai/demo", prompt="one two", max_tokens=5, temperature=0, **WHERE)
messages = litellm.completion(**CHAT | {"model": "anthropic/demo", "api_base": URL})
tell(
    whole=whole.choices[0].message.content,
    whole_tokens=whole.usage.completion_tokens,
    sync=sync,
    text=text,
    num_tokens=num_tokens,
    call=[call.function.name, call.function.arguments],
    plain=plain.choices[0].text,
    plain_tokens=plain.usage.completion_tokens,
    messages=messages.choices[0].message.content,
    unknown_model=error_of(model="openai/nobody"),
    wrong_key=error_of(api_key="wrong"),
    bad_field=error_of(top_p=7),
)
