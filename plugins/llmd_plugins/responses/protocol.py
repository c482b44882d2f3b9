"""The request of POST /v1/responses as a pydantic model: what validates is what /openapi.json shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from llmd.api.v1 import InvalidRequest, RequestFields, Whole
from llmd_plugins.responses.items import INPUT_SCHEMA, TOOLS_SCHEMA, parse_input, parse_tool_choice, parse_tools

# Fields that are known and not served, and the values of theirs that ask for nothing.
UNSERVED: Mapping[str, Collection[Any]] = {
    "access_programs": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": (),
    "top_logprobs": (0,),
}
_INCLUDES = (
    "message.output_text.logprobs", "file_search_call.results", "message.input_image.image_url",
    "computer_call_output.output.image_url", "web_search_call.results", "web_search_call.action.sources",
    "code_interpreter_call.outputs",
)  # fmt: skip
_SERVED_INCLUDE = "reasoning.encrypted_content"  # reasoning comes as plain text, which may be sent back as it is
_MAX_METADATA = 16

_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "required": ["type", "name"],
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
        },
    ]
}


def parse_include(value: Any) -> list[str] | None:
    """What else the answer shall hold. Raises InvalidRequest."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > len(_INCLUDES) + 1:
        raise InvalidRequest("include must be a short list of names", param="include", code="invalid_value")
    for index, name in enumerate(value):
        if name != _SERVED_INCLUDE:
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
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"const": _SERVED_INCLUDE}, "maxItems": 1}, {"type": "null"}]}),
]
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
    """How the text shall look."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(RequestFields):
    """How much to reason; a summary is never written: the reasoning itself is in the answer."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class StreamOptions(RequestFields):
    """Accepted, without an effect here."""

    include_obfuscation: bool | None = None


class ResponseRequest(RequestFields):
    """POST /v1/responses."""

    input: Input
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Whole | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    tools: Tools = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Include = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: ResponseId | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=_MAX_METADATA)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # accepted, without an effect here
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ResponseRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream=true", param="stream_options")
        if self.background and self.stream:
            message = "background and stream are not served together: poll GET /v1/responses/{id}"
            raise InvalidRequest(message, param="background", code="unsupported_parameter")
        if self.background and self.store is False:
            raise InvalidRequest("background needs store=true", param="background")
        if self.tool_choice not in (None, "none", "auto"):
            self._check_choice()
        return self

    def _check_choice(self) -> None:
        names = [tool["name"] for tool in self.tools or ()]
        if not names:
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        if isinstance(self.tool_choice, dict) and self.tool_choice["name"] not in names:
            shown = self.tool_choice["name"][:80]
            raise InvalidRequest(
                f"tool_choice.name must be the name of one of the tools, got {shown!r}", param="tool_choice"
            )
