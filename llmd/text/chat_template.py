"""Messages into a prompt, by the model's own jinja2 template in a sandbox, as transformers renders it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from llmd.errors import InvalidRequest, ModelError
from llmd.text.sandbox import RangeBudget, bounded, loops_over_content, make_environment, plain, text_of_parts

MAX_TEMPLATE_BYTES = 4 << 20
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_RESERVED = frozenset(["messages", "tools", "documents", "add_generation_prompt", "range", "self"])


class ChatTemplate:
    """A model's chat templates by name: "default", "tool_use" when there are tools, "rag" when there are documents."""

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        max_bytes: int = MAX_TEMPLATE_BYTES,
    ) -> None:
        """Raises ModelError when a template cannot be compiled."""
        self.templates = {"default": templates} if isinstance(templates, str) else dict(templates)
        self.special_tokens = dict(special_tokens or {})
        self.max_bytes = max_bytes
        for name, source in self.templates.items():
            _compile_own(name, source)

    def render(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt. `chat_template` is the name of one of the templates, or a template; the rest goes to the template.

        Raises InvalidRequest when the template refuses the messages or gets too long.
        """
        source = self._choose(chat_template, tools, documents)
        chat = _checked(messages)
        if not loops_over_parts(source):
            _flatten(chat)
        if reserved := _RESERVED.intersection(kwargs):
            raise InvalidRequest(f"{min(reserved)} cannot be set for a chat template", param="chat_template_kwargs")
        values = {**self.special_tokens, **plain(kwargs), "tools": plain(tools), "documents": plain(documents)}
        if not continue_final_message:
            return self._render(source, messages=chat, add_generation_prompt=add_generation_prompt, **values)
        if add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        final = _tag_final(chat, continue_final_message, source)
        return _cut_at_tag(self._render(source, messages=chat, add_generation_prompt=False, **values), final)

    def _choose(self, name: str | None, tools: Sequence[Any] | None, documents: Sequence[Any] | None) -> str:
        if name is not None:
            return self.templates.get(name, name)
        for wanted, is_wanted in (("tool_use", tools is not None), ("rag", bool(documents)), ("default", True)):
            if is_wanted and wanted in self.templates:
                return self.templates[wanted]
        known = f": name one of {', '.join(sorted(self.templates))}" if self.templates else ""
        raise InvalidRequest(f"the model has no default chat template{known}", param="chat_template")

    def _render(self, source: str, **values: Any) -> str:
        try:
            return bounded(_compile(source).generate(range=RangeBudget(), **values), self.max_bytes)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidRequest(f"chat_template line {error.lineno}: {error.message}", param="chat_template") from error
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}", param="messages") from error
        except Exception as error:  # templates run into whatever Python raises for values of the wrong type
            reason = f"{type(error).__name__}: {error}"[:300]
            raise InvalidRequest(f"the chat template cannot render the messages ({reason})", param="messages") from error


def load_override(value: str | None) -> str | None:
    """A template given in the configuration: the path of a file, or the template itself. Raises ModelError."""
    if value is None or "{" in value or "\n" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"chat_template: neither a template nor a file that can be read ({type(error).__name__})"
        ) from error


_environment = lru_cache(maxsize=1)(make_environment)


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _compile_own(name: str, source: str) -> None:
    try:
        _compile(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"chat template {name!r} line {error.lineno}: {error.message}") from error
    except RecursionError:
        raise ModelError(f"chat template {name!r} is nested too deeply") from None


@lru_cache(maxsize=64)
def loops_over_parts(source: str) -> bool:
    """Whether the template takes content as a list of parts; if not, parts of text are joined for it."""
    try:
        return loops_over_content(source, _environment())
    except (jinja2.TemplateSyntaxError, RecursionError):  # told when it is rendered
        return False


def _checked(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """A plain copy of the messages, without keys that are None, reasoning under every name that templates read."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", param="messages")
    chat = []
    for index, message in enumerate(plain(messages)):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{index}] must be an object with role and content", param="messages")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in _REASONING_FIELDS if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        chat.append(message)
    return chat


def _flatten(chat: list[dict[str, Any]]) -> None:
    for index, message in enumerate(chat):
        if isinstance(message.get("content"), list):
            text = text_of_parts(message["content"])
            if text is None:
                raise InvalidRequest(
                    f"messages[{index}].content has parts that are not text, and this model takes only text",
                    param="messages",
                )
            message["content"] = text


def _tag_final(chat: list[dict[str, Any]], field: bool | str, source: str) -> str:
    """Mark the end of the final message's text; returns that text."""
    name = field if isinstance(field, str) else "content"
    final = chat[-1].get(name)
    if final is None:
        raise _cannot_continue(f"the final message has no {name}")
    names = [key for key in _REASONING_FIELDS if chat[-1].get(key) == final] if name in _REASONING_FIELDS else [name]
    if not any(key in source for key in names):
        raise _cannot_continue(f"the chat template does not use {name}")
    if isinstance(final, list):
        return _tag_part(final)
    if not isinstance(final, str):
        raise _cannot_continue(f"{name} of the final message is not text")
    for key in names:
        chat[-1][key] = final + _CONTINUE_TAG
    return final


def _tag_part(parts: list[Any]) -> str:
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text = part["text"]
            part["text"] = text + _CONTINUE_TAG
            return text
    raise _cannot_continue("the final message has no text")


def _cut_at_tag(prompt: str, final: str) -> str:
    tag = _CONTINUE_TAG.strip()
    if final.strip() not in prompt or tag not in prompt:
        raise _cannot_continue("the chat template leaves out or changes the final message")
    end = prompt.rindex(tag)
    is_kept = prompt.startswith(_CONTINUE_TAG, end)
    return prompt[:end] if is_kept else prompt[:end].rstrip()


def _cannot_continue(reason: str) -> InvalidRequest:
    return InvalidRequest(f"continue_final_message is set but {reason}", param="continue_final_message")
