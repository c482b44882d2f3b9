"""The OpenAI API: models, completions, chat completions, tokenize and detokenize."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llmd.api.v1 import ConfigSectionSpec, RouteSpec, Section, hookimpl


class OpenAISettings(Section):
    """`[plugins.openai]`."""

    trust_request_chat_template: bool = Field(False, description="let requests bring a chat template of their own")
    keepalive_s: float = Field(15.0, gt=0, description="a comment is sent to a stream that has been quiet so long")


def _models(context: Any) -> Any:
    from llmd_plugins.openai.models import list_models

    return list_models(context)


def _model(context: Any) -> Any:
    from llmd_plugins.openai.models import show_model

    return show_model(context)


def _completions(context: Any) -> Any:
    from llmd_plugins.openai.completions import completions

    return completions(context)


def _chat(context: Any) -> Any:
    from llmd_plugins.openai.chat import chat_completions

    return chat_completions(context)


def _tokenize(context: Any) -> Any:
    from llmd_plugins.openai.tokens import tokenize

    return tokenize(context)


def _detokenize(context: Any) -> Any:
    from llmd_plugins.openai.tokens import detokenize

    return detokenize(context)


def _tokenizer_info(context: Any) -> Any:
    from llmd_plugins.openai.tokens import tokenizer_info

    return tokenizer_info(context)


def _operation(name: str) -> Any:
    def build() -> Any:
        from llmd_plugins.openai import operations

        return getattr(operations, name)()

    return build


@hookimpl
def llmd_register_config_sections() -> list[ConfigSectionSpec]:
    """What an operator may set."""
    return [ConfigSectionSpec(name="openai", summary="the OpenAI API", model=OpenAISettings)]


@hookimpl
def llmd_register_routes() -> list[RouteSpec]:
    """The routes, with vLLM's places for tokenize and detokenize."""
    return [
        RouteSpec(
            name="openai.models", summary="the served models", method="GET", path="/v1/models", build=_models,
            openapi=_operation("models"),
        ),
        RouteSpec(
            name="openai.model", summary="one served model", method="GET", path="/v1/models/{model:.+}", build=_model,
            openapi=_operation("model"),
        ),
        RouteSpec(
            name="openai.completions", summary="continue a prompt", method="POST", path="/v1/completions",
            build=_completions, openapi=_operation("completions"),
        ),
        RouteSpec(
            name="openai.chat", summary="answer a conversation", method="POST", path="/v1/chat/completions",
            build=_chat, openapi=_operation("chat"),
        ),
        RouteSpec(
            name="openai.tokenize", summary="text or a conversation to token ids", method="POST", path="/tokenize",
            build=_tokenize, openapi=_operation("tokenize"),
        ),
        RouteSpec(
            name="openai.detokenize", summary="token ids to text", method="POST", path="/detokenize",
            build=_detokenize, openapi=_operation("detokenize"),
        ),
        RouteSpec(
            name="openai.tokenizer_info", summary="what the tokenizer's files say", method="GET",
            path="/tokenizer_info", build=_tokenizer_info, openapi=_operation("tokenizer_info"),
        ),
    ]  # fmt: skip
