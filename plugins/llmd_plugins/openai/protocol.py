"""The requests of the OpenAI API, with vLLM's extras, as pydantic models: what validates is what /openapi.json shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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

from llmd.api.v1 import InvalidRequest, shown
from llmd_plugins.openai.constraints import (
    RESPONSE_FORMAT_SCHEMA,
    STRUCTURED_SCHEMA,
    check_response_format,
    check_structured,
)
from llmd_plugins.openai.messages import MESSAGES_SCHEMA, parse_messages
from llmd_plugins.openai.tools import (
    FUNCTION_CALL_SCHEMA,
    FUNCTIONS_SCHEMA,
    TOOL_CHOICE_SCHEMA,
    TOOLS_SCHEMA,
    check_functions,
    check_tools,
    parse_function_call,
    parse_tool_choice,
)

MAX_ENTRIES = 1024  # of logit_bias, documents, metadata and the like


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 63 else value


def _list_of(kind: type, words: str, *, required: bool = False) -> Any:
    """A validator that stops at the first wrong entry: a list may have a million."""

    def check(value: Any, info: ValidationInfo) -> list[Any] | None:
        if value is None and not required:
            return None
        name = info.field_name or ""
        if not isinstance(value, list):
            raise InvalidRequest(f"{name} must be a list of {words}s, got {shown(value)}", param=name, code="invalid_value")
        if not set(map(type, value)) <= {kind}:  # at C's speed
            index = next(index for index, entry in enumerate(value) if type(entry) is not kind)
            path = f"{name}[{index}]"
            raise InvalidRequest(f"{path} must be a {words}, got {shown(value[index])}", param=path, code="invalid_value")
        return value

    return PlainValidator(check)


_strings, _token_ids = _list_of(str, "string"), _list_of(int, "token id")


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _few(value: Any, info: ValidationInfo) -> Any:
    """The number of entries, before each is looked at."""
    if isinstance(value, dict | list) and len(value) > MAX_ENTRIES:
        name = info.field_name or ""
        raise InvalidRequest(f"{name} must have at most {MAX_ENTRIES} entries, got {len(value)}", param=name)
    return value


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}  # a prompt may have a million


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


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_ID = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
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
ToolChoice = Annotated[str | None, PlainValidator(parse_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)]
Functions = Annotated[
    list[dict[str, Any]] | None, PlainValidator(check_functions), WithJsonSchema(_nullable(FUNCTIONS_SCHEMA))
]
FunctionCall = Annotated[str | None, PlainValidator(parse_function_call), WithJsonSchema(FUNCTION_CALL_SCHEMA)]
ResponseFormat = Annotated[
    dict[str, Any] | None, PlainValidator(check_response_format), WithJsonSchema(_nullable(RESPONSE_FORMAT_SCHEMA))
]
Structured = Annotated[dict[str, Any] | None, PlainValidator(check_structured), WithJsonSchema(_nullable(STRUCTURED_SCHEMA))]
Choices = Annotated[list[str] | None, _strings, WithJsonSchema(_nullable({"type": "array", "items": {"type": "string"}}))]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
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
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few)] = None
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
    metadata: Annotated[dict[str, Any] | None, BeforeValidator(_few)] = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    timeout: float | None = Field(None, gt=0, le=86400, description="seconds that the request may take; then it is a 504")
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
    # what the output must follow
    response_format: ResponseFormat = None
    structured_outputs: Structured = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: Choices = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None  # the operator chooses
    # several answers and the best of them
    best_of: Whole | None = Field(None, ge=1)
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    @model_validator(mode="after")
    def _check_best(self) -> Generation:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise InvalidRequest(f"best_of must be at least n ({self.n or 1}), got {self.best_of}", param="best_of")
        if self.stream and self.is_ranked:
            name = "use_beam_search" if self.use_beam_search else "best_of"
            raise InvalidRequest(f"{name} is not available with stream=true", param=name)
        for name, neutral in (("length_penalty", (None, 1.0)), ("early_stopping", (None, False))):
            if not self.use_beam_search and getattr(self, name) not in neutral:
                raise InvalidRequest(f"{name} needs use_beam_search=true", param=name)
        return self

    @property
    def is_ranked(self) -> bool:
        """Whether more is generated than is answered."""
        return bool(self.use_beam_search) or (self.best_of or 1) > (self.n or 1)

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
    suffix: str | None = None
    logprobs: Whole | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _check_suffix(self) -> CompletionRequest:
        if self.suffix and self.echo:
            raise InvalidRequest("echo is not available with a suffix", param="echo")
        return self


class ChatTemplateFields(Fields):
    """How a conversation becomes a prompt."""

    messages: Messages
    tools: Tools = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_few)] = None
    documents: Annotated[list[dict[str, str]] | None, BeforeValidator(_few)] = None

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
    functions: Functions = None
    function_call: FunctionCall = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: Whole | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", param="top_logprobs")
        if self.functions and (self.tools or self.tool_choice):
            raise InvalidRequest("functions are the old form of tools: give one of them", param="functions")
        if self.function_call not in (None, "none") and not self.functions:
            raise InvalidRequest("function_call needs functions", param="function_call")
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
    tokens: Annotated[list[int], _list_of(int, "token id", required=True), WithJsonSchema({"type": "array", "items": _ID})]
