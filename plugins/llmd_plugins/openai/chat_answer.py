"""How a choice of a chat completion is written: whole, or as the events of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import TextDelta
from llmd_plugins.openai.frames import Frames, ending

if TYPE_CHECKING:
    from llmd.api.v1 import ChatAnswer, ChatDelta, ToolCallDelta
    from llmd_plugins.openai.call import Call
    from llmd_plugins.openai.logprobs import LogprobFormat
    from llmd_plugins.openai.protocol import ChatRequest


def choice_of(answer: ChatAnswer, logprobs: LogprobFormat | None, body: ChatRequest) -> dict[str, Any]:
    """A whole choice."""
    choice: dict[str, Any] = {
        "index": answer.index,
        "message": _message(answer, is_old=bool(body.functions)),
        "logprobs": logprobs.chat(answer.logprobs or ()) if logprobs is not None else None,
        **_ending(answer, is_old=bool(body.functions)),
    }
    if body.return_token_ids:
        choice["token_ids"] = list(answer.token_ids)
    return choice


def _message(answer: ChatAnswer, *, is_old: bool) -> dict[str, Any]:
    """`is_old`: a call goes into function_call."""
    is_silent = not answer.content and (answer.tool_calls or answer.reasoning)
    message: dict[str, Any] = {"role": "assistant", "content": None if is_silent else answer.content, "refusal": None}
    if answer.reasoning:
        message |= _reasoning(answer.reasoning)
    if answer.tool_calls and is_old:
        call = answer.tool_calls[0]
        message["function_call"] = {"name": call.name, "arguments": call.arguments}
    elif answer.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.tool_calls
        ]
    return message


def _reasoning(text: str) -> dict[str, Any]:
    """Under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}


def _ending(delta: Any, *, is_old: bool) -> dict[str, Any]:
    ended = ending(delta)
    if is_old and ended["finish_reason"] == "tool_calls":
        ended["finish_reason"] = "function_call"
    return ended


class ChatFrames(Frames):
    """Events of a chat stream; the first one of each choice tells the role."""

    OBJECT = "chat.completion.chunk"
    TEXT_HEAD = b',"delta":{"content":'
    TEXT_TAIL = b'},"logprobs":null,"finish_reason":null}'

    def __init__(self, call: Call, body: ChatRequest, logprobs: LogprobFormat | None) -> None:
        super().__init__(call, logprobs)
        self._is_old = bool(body.functions)

    def _has_news(self, delta: TextDelta | ChatDelta) -> bool:
        if super()._has_news(delta):
            return True
        return not isinstance(delta, TextDelta) and (bool(delta.reasoning) or delta.tool_call is not None)

    def choice(self, index: int, prompt_index: int, delta: TextDelta | ChatDelta, is_first: bool) -> dict[str, Any]:
        """`delta` holds what is new of the message."""
        news: dict[str, Any] = {"role": "assistant", "content": delta.text} if is_first else {}
        if delta.text:
            news["content"] = delta.text
        if not isinstance(delta, TextDelta):
            self._add(news, delta)
        logprobs = self.logprobs.chat(delta.logprobs) if self.logprobs is not None and delta.logprobs else None
        answer = {"index": index, "delta": news, "logprobs": logprobs, **_ending(delta, is_old=self._is_old)}
        if self.wants_token_ids:
            answer["token_ids"] = list(delta.token_ids)
        return answer

    def _add(self, news: dict[str, Any], delta: ChatDelta) -> None:
        """Reasoning and calls; a message that begins with one of them has no content yet."""
        if delta.reasoning:
            news |= _reasoning(delta.reasoning)
        if (call := delta.tool_call) is not None:
            news |= {"function_call": _function(call)} if self._is_old else {"tool_calls": [_call(call)]}
        if "role" in news and len(news) > 2:
            news["content"] = None

    def extra(self, prompt_index: int, is_first: bool) -> dict[str, Any]:
        """The prompt's token ids, once, where they were asked for."""
        if is_first and self.wants_token_ids:
            return {"prompt_token_ids": list(self.call.streams[0].request.prompt.token_ids)}
        return {}


def _function(call: ToolCallDelta) -> dict[str, Any]:
    return {"arguments": call.arguments} if call.name is None else {"name": call.name, "arguments": call.arguments}


def _call(call: ToolCallDelta) -> dict[str, Any]:
    """A piece of a call; id, type and name come with the first."""
    head = {} if call.id is None else {"id": call.id, "type": "function"}
    return {"index": call.index, **head, "function": _function(call)}
