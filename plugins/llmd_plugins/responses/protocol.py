"""The request of POST /v1/responses as a pydantic model: what validates is what /openapi.json shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from llmd.api.v1 import InvalidRequest, RequestFields, Whole
from llmd_plugins.responses.items import INPUT_SCHEMA, TOOLS_SCHEMA, names_of, parse_input, parse_tool_choice, parse_tools

# Fields that are known and not served, and the values of theirs that ask for nothing.
UNSERVED: Mapping[str, Collection[Any]] = {
    "access_programs": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": (),
    # of vLLM
    "enable_response_messages": (False,),
    "logit_bias": ({},),
    "mm_processor_kwargs": (),
    "previous_input_messages": (),
    "previous_response": (),
    "structured_outputs": (),
    "vllm_xargs": (),
    # of the counting of tokens
    "personality": (),
}
_INCLUDES = (
    "file_search_call.results", "message.input_image.image_url",
    "computer_call_output.output.image_url", "web_search_call.results", "web_search_call.action.sources",
    "code_interpreter_call.outputs",
)  # fmt: skip
LOGPROBS = "message.output_text.logprobs"
_SERVED_INCLUDES = (LOGPROBS, "reasoning.encrypted_content")  # reasoning comes as plain text, to be sent back as it is
_MAX_METADATA = 16

_NAMED = {
    "type": "object",
    "required": ["type", "name"],
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
}
_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        _NAMED,
        {
            "type": "object",
            "required": ["type", "mode", "tools"],
            "additionalProperties": False,
            "properties": {
                "type": {"const": "allowed_tools"},
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "items": _NAMED},
            },
        },
    ]
}


def parse_include(value: Any) -> list[str] | None:
    """What else the answer shall hold. Raises InvalidRequest."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > len(_INCLUDES) + len(_SERVED_INCLUDES):
        raise InvalidRequest("include must be a short list of names", param="include", code="invalid_value")
    for index, name in enumerate(value):
        if name not in _SERVED_INCLUDES:
            known = isinstance(name, str) and name in _INCLUDES
            message = f"include[{index}] is not served by this server" if known else f"include[{index}] is not known"
            code = "unsupported_parameter" if known else "invalid_value"
            raise InvalidRequest(f"{message}, got {str(name)[:80]!r}", param=f"include[{index}]", code=code)
    return value


Input = Annotated[list[dict[str, Any]], PlainValidator(parse_input), WithJsonSchema(INPUT_SCHEMA)]
Tools = Annotated[list[dict[str, Any]] | None, PlainValidator(parse_tools), WithJsonSchema(TOOLS_SCHEMA)]
Choice = Annotated[Any, PlainValidator(parse_tool_choice), WithJsonSchema(_TOOL_CHOICE_SCHEMA)]
Include = Annotated[
    list[str] | None,
    PlainValidator(parse_include),
    WithJsonSchema(
        {"anyOf": [{"type": "array", "items": {"enum": list(_SERVED_INCLUDES)}, "maxItems": 2}, {"type": "null"}]}
    ),
]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:\-]{1,128}$")]
ResponseId = Annotated[str, Field(min_length=1, max_length=256)]


class TextFormat(RequestFields):
    """text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            message = "text.format.schema belongs to text.format.type 'json_schema'"
            raise InvalidRequest(message, param="text.format.schema", code="invalid_value")
        return self


class TextConfig(RequestFields):
    """How the text shall look. Verbosity is a hint that no template here takes: accepted, without an effect."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(RequestFields):
    """How much to reason. Whatever summary is asked for, none is written: the reasoning itself is in the answer."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    mode: Literal["standard"] | None = None
    context: Literal["auto", "all_turns"] | None = None  # items of reasoning go to the template as they come


class StreamOptions(RequestFields):
    """Accepted, without an effect here."""

    include_obfuscation: bool | None = None


class PromptFields(RequestFields):
    """What makes the prompt, of an answer and of the counting of tokens."""

    model: str | None = None
    instructions: str | None = None
    tools: Tools = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    previous_response_id: ResponseId | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @model_validator(mode="after")
    def _check_choice(self) -> PromptFields:
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return self
        names = [tool["name"] for tool in self.tools or ()]
        if not names:
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        if isinstance(choice, dict) and (unknown := [name for name in names_of(choice) if name not in names]):
            message = f"tool_choice must name some of the tools, got {unknown[0][:80]!r}"
            raise InvalidRequest(message, param="tool_choice")
        return self


class CountRequest(PromptFields):
    """POST /v1/responses/input_tokens."""

    input: Input = []


class ResponseRequest(PromptFields):
    """POST /v1/responses."""

    input: Input
    max_output_tokens: Whole | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Whole | None = Field(None, ge=0)
    include: Include = None
    store: bool | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = Field(None, max_length=_MAX_METADATA)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # of vLLM
    top_k: Whole | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Whole = Field(0, ge=-(1 << 31), lt=1 << 31)
    request_id: RequestId | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    # accepted, without an effect here
    max_tool_calls: Whole | None = Field(None, ge=0, description="bounds a server's own tools, of which there are none")
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the message's text comes with log-probabilities."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @model_validator(mode="after")
    def _check_together(self) -> ResponseRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream=true", param="stream_options")
        if self.background and self.store is False:
            raise InvalidRequest("background needs store=true", param="background")
        return self
