"""The requests of the OpenAI API, with vLLM's extras, as pydantic models: what validates is what /openapi.json shows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from llmd.api.v1 import InvalidRequest
from llmd_plugins.openai.fields import shown
from llmd_plugins.openai.messages import MESSAGES_SCHEMA, TOOLS_SCHEMA, check_tools, parse_messages


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 63 else value


def _list_of(kind: type, words: str) -> Any:
    """A validator that stops at the first wrong entry: a list may have a million."""

    def check(value: Any, info: ValidationInfo) -> list[Any] | None:
        if value is None:
            return None
        name = info.field_name or ""
        if not isinstance(value, list):
            raise InvalidRequest(f"{name} must be a list of {words}s, got {shown(value)}", param=name, code="invalid_value")
        index = next((index for index, entry in enumerate(value) if type(entry) is not kind), None)
        if index is not None:
            path = f"{name}[{index}]"
            raise InvalidRequest(f"{path} must be a {words}, got {shown(value[index])}", param=path, code="invalid_value")
        return value

    return PlainValidator(check)


_strings, _token_ids = _list_of(str, "string"), _list_of(int, "token id")


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}  # at C's speed: a prompt may have a million


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """A string, token ids, or a list of either, as a list of prompts."""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            f"prompt must be a string, a list of token ids, or a list of either, got {shown(value)}",
            param="prompt",
            code="invalid_value",
        )
    for index, prompt in enumerate(value):
        if not isinstance(prompt, str) and not _is_token_ids(prompt):
            path = f"prompt[{index}]"
            raise InvalidRequest(f"{path} must be a string or a list of token ids, got {shown(prompt)}", param=path)
    return value


def _parse_tool_choice(value: Any) -> str | None:
    """none, auto, required, or the quoted name of the function that must be called."""
    if value is None or value in ("none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type", "function") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        allowed = "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': …}}"
        raise InvalidRequest(f"tool_choice must be {allowed}, got {shown(value)}", param="tool_choice", code="invalid_value")
    return f"function {name!r}"


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_ID = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
        },
    ]
}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _IDS,
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}

Whole = Annotated[int, BeforeValidator(_whole)]
TokenIds = Annotated[list[int] | None, _token_ids, WithJsonSchema(_nullable({"type": "array", "items": _ID}))]
Strings = Annotated[list[str] | None, _strings, WithJsonSchema(_nullable({"type": "array", "items": {"type": "string"}}))]
Stop = Annotated[list[str] | None, _strings, BeforeValidator(_one_or_many), WithJsonSchema(_nullable(_STRINGS))]
Prompts = Annotated[list[str | list[int]], PlainValidator(_parse_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
Messages = Annotated[list[dict[str, Any]], PlainValidator(parse_messages), WithJsonSchema(MESSAGES_SCHEMA)]
Tools = Annotated[list[dict[str, Any]] | None, PlainValidator(check_tools), WithJsonSchema(_nullable(TOOLS_SCHEMA))]
ToolChoice = Annotated[str | None, PlainValidator(_parse_tool_choice), WithJsonSchema(_TOOL_CHOICE_SCHEMA)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:\-]{1,128}$")]


class Fields(BaseModel):
    """A request, or an object in one: no conversion of types, no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), regex_engine="python-re")


class StreamOptions(Fields):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Generation(Fields):
    """What completions and chat completions share."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Whole | None = None
    n: Whole | None = None
    presence_penalty: float | None = None
    seed: Whole | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # accepted, without an effect here
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # vLLM's
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Whole | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Whole | None = Field(None, ge=-1)
    prompt_logprobs: Whole | None = None
    allowed_token_ids: TokenIds = None
    bad_words: Strings = None
    priority: Whole = Field(0, ge=-(1 << 31), lt=1 << 31)
    request_id: RequestId | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream=true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs is not available with stream=true", param="prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest("truncate_prompt_tokens must be -1 or at least 1, got 0", param="truncate_prompt_tokens")
        return self


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Whole | None = Field(None, ge=0)


class ChatTemplateFields(Fields):
    """How a conversation becomes a prompt."""

    messages: Messages
    tools: Tools = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None

    @model_validator(mode="after")
    def _check_template(self) -> ChatTemplateFields:
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt cannot both be true"
            raise InvalidRequest(message, param="continue_final_message")
        return self


class ChatRequest(Generation, ChatTemplateFields):
    """POST /v1/chat/completions."""

    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", param="top_logprobs")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        return self


class TokenizePrompt(Fields):
    """POST /tokenize for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChat(ChatTemplateFields):
    """POST /tokenize for a conversation."""

    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], _token_ids, WithJsonSchema({"type": "array", "items": _ID})]
