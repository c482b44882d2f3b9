"""The requests of Anthropic's API as pydantic models: what validates is what /openapi.json shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from llmd.api.v1 import InvalidRequest, RequestFields, Whole
from llmd_plugins.anthropic.messages import (
    MESSAGES_SCHEMA,
    SYSTEM_SCHEMA,
    TOOLS_SCHEMA,
    ToolChoice,
    parse_messages,
    parse_system,
    parse_tool_choice,
    parse_tools,
)

# Fields of Anthropic's requests that are known and not served, and the values of theirs that ask for nothing.
UNSERVED: Mapping[str, Collection[Any]] = {
    "container": (),
    "mcp_servers": ([],),
    "context_management": ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    "diagnostics": (),
    "prefill": (),
    "speed": ("standard",),
    "fallbacks": ([],),
    "billing_policy": (),
    "compaction": (),
    "fallback_credit_token": (),
    "thread": (),
    "output_format": (),  # of an older beta: output_config.format
}

_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"enum": ["auto", "any", "tool", "none"]},
                "name": {"type": "string"},
                "disable_parallel_tool_use": {"type": "boolean"},
            },
        },
        {"type": "null"},
    ]
}

Messages = Annotated[list[dict[str, Any]], PlainValidator(parse_messages), WithJsonSchema(MESSAGES_SCHEMA)]
System = Annotated[list[str], PlainValidator(parse_system), WithJsonSchema(SYSTEM_SCHEMA)]
Tools = Annotated[list[dict[str, Any]] | None, PlainValidator(parse_tools), WithJsonSchema(TOOLS_SCHEMA)]
Choice = Annotated[ToolChoice, PlainValidator(parse_tool_choice), WithJsonSchema(_TOOL_CHOICE_SCHEMA)]


class Thinking(RequestFields):
    """Whether the model may reason before it answers, and how long."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Whole | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> Thinking:
        if self.type == "enabled" and self.budget_tokens is None:
            path = "thinking.budget_tokens"
            raise InvalidRequest(f"{path} is required where thinking is enabled", param=path)
        return self


class OutputFormat(RequestFields):
    """The JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestFields):
    """How much effort, and in which format."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(RequestFields):
    """Accepted, without an effect here."""

    user_id: str | None = None


class CountTokensRequest(RequestFields):
    """POST /v1/messages/count_tokens, and the part of a message's request that makes its prompt."""

    model: str
    messages: Messages
    system: System = []
    tools: Tools = None
    tool_choice: Choice = ToolChoice()
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None  # every prefix is cached here

    @model_validator(mode="after")
    def _check_choice(self) -> CountTokensRequest:
        choice = self.tool_choice
        if choice.name is not None or choice.mode == "required":
            names = [tool["function"]["name"] for tool in self.tools or ()]
            if not names:
                raise InvalidRequest("tool_choice needs tools", param="tool_choice")
            if choice.name is not None and choice.name not in names:
                message = f"tool_choice.name must be the name of one of the tools, got {choice.name[:80]!r}"
                raise InvalidRequest(message, param="tool_choice.name")
        if self.messages[-1].get("tool_calls"):
            message = "messages must not end with a tool_use block: its tool_result comes next"
            raise InvalidRequest(message, param="messages", code="invalid_value")
        return self


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Whole = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    # accepted, without an effect here
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
    # not Anthropic's: who is served first, as in the other formats
    priority: Whole = Field(0, ge=-(1 << 31), lt=1 << 31)

    @model_validator(mode="after")
    def _check_thinking(self) -> MessagesRequest:
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            path = "thinking.budget_tokens"
            raise InvalidRequest(f"{path} must be less than max_tokens ({self.max_tokens}), got {budget}", param=path)
        return self
