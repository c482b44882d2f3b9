"""The requests as pydantic models: what validates is what /openapi.json shows."""

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
from llmd_plugins.pooling.messages import MESSAGES_SCHEMA, parse_messages

Text = str | list[int]


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 63 else value


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _wrong(path: str, words: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{path} must be {words}, got {shown(value)}", param=path, code="invalid_value")


def _parse_texts(value: Any, info: ValidationInfo) -> list[Text]:
    """A string, token ids, or a list of either, as a list."""
    name = info.field_name or ""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a string, a list of token ids, or a list of either", value)
    for index, text in enumerate(value):
        if not isinstance(text, str) and not _is_token_ids(text):
            raise _wrong(f"{name}[{index}]", "a string or a list of token ids", text)
    return value


def _parse_strings(value: Any, info: ValidationInfo) -> list[str]:
    """A string, or a list of them, as a list."""
    name = info.field_name or ""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a string or a list of strings", value)
    index = next((index for index, text in enumerate(value) if not isinstance(text, str)), None)
    if index is not None:
        raise _wrong(f"{name}[{index}]", "a string", value[index])
    return value


def _parse_documents(value: Any, info: ValidationInfo) -> list[str]:
    """Strings or {"text": string}, as strings."""
    name = info.field_name or ""
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a list of strings or of objects with a text", value)
    texts = []
    for index, document in enumerate(value):
        text = document.get("text") if isinstance(document, dict) and document.keys() == {"text"} else document
        if not isinstance(text, str):
            raise _wrong(f"{name}[{index}]", 'a string or {"text": string}', document)
        texts.append(text)
    return texts


_STRING = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}, "minItems": 1}
_STRINGS = {"type": "array", "items": _STRING, "minItems": 1}
_TEXTS_SCHEMA = {"anyOf": [_STRING, _IDS, _STRINGS, {"type": "array", "items": _IDS, "minItems": 1}]}
_DOCUMENT = {
    "type": "object", "required": ["text"], "properties": {"text": _STRING}, "additionalProperties": False,
}  # fmt: skip
_DOCUMENTS_SCHEMA = {"type": "array", "minItems": 1, "items": {"anyOf": [_STRING, _DOCUMENT]}}

Whole = Annotated[int, BeforeValidator(_whole)]
Texts = Annotated[list[Text], PlainValidator(_parse_texts), WithJsonSchema(_TEXTS_SCHEMA)]
Strings = Annotated[list[str], PlainValidator(_parse_strings), WithJsonSchema({"anyOf": [_STRING, _STRINGS]})]
Documents = Annotated[list[str], PlainValidator(_parse_documents), WithJsonSchema(_DOCUMENTS_SCHEMA)]
Messages = Annotated[list[dict[str, Any]] | None, PlainValidator(parse_messages), WithJsonSchema(MESSAGES_SCHEMA)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:\-]{1,128}$")]


class Fields(BaseModel):
    """No conversion of types, no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), regex_engine="python-re")


class Common(Fields):
    """What every request here may say."""

    model: str | None = None
    user: str | None = None  # accepted, without an effect
    priority: Whole = Field(0, ge=-(1 << 31), lt=1 << 31)
    request_id: RequestId | None = None
    timeout: float | None = Field(None, gt=0, le=86400, description="seconds that the request may take; then it is a 504")
    truncate_prompt_tokens: Whole | None = Field(None, ge=-1, description="keep the first so many tokens; -1: the context")

    @model_validator(mode="after")
    def _check_truncation(self) -> Common:
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest("truncate_prompt_tokens must be -1 or at least 1, got 0", param="truncate_prompt_tokens")
        return self


_OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class TextsRequest(Common):
    """What those have that take texts, or one conversation."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["input"]}, {"required": ["messages"]}]})

    input: Texts = []
    messages: Messages = None
    add_special_tokens: bool | None = Field(None, description="default: with input, as templates write their own")
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_input(self) -> TextsRequest:
        if self.input and self.messages is not None:
            raise InvalidRequest("input and messages exclude each other", param="messages", code="invalid_value")
        if not self.input and self.messages is None:
            raise InvalidRequest("input is required", param="input", code="missing_required_parameter")
        if self.messages is None and (extra := [name for name in _OF_MESSAGES if getattr(self, name)]):
            raise InvalidRequest(f"{extra[0]} belongs to messages", param=extra[0], code="invalid_value")
        if self.add_generation_prompt and self.continue_final_message:
            message = "continue_final_message and add_generation_prompt exclude each other"
            raise InvalidRequest(message, param="continue_final_message", code="invalid_value")
        return self


class VectorsRequest(TextsRequest):
    """What those have that give vectors."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = Field(None, ge=1)
    normalize: bool | None = None
    prompt_name: str | None = Field(None, description="which of the model's prompts leads each text")
    input_type: str | None = Field(None, description="query, document …: the model's prompt for it, where it has one")


class EmbeddingRequest(VectorsRequest):
    """POST /v1/embeddings."""


class PoolingRequest(VectorsRequest):
    """POST /pooling."""

    task: Literal["embed", "classify", "token_embed"] | None = Field(None, description="default: what the model is for")
    use_activation: bool | None = None


class ClassifyRequest(TextsRequest):
    """POST /classify."""

    use_activation: bool | None = Field(None, description="false: scores before softmax or sigmoid")


class PairsRequest(Common):
    """What those have that take pairs of texts."""

    use_activation: bool | None = None
    instruction: str | None = Field(None, description="for models with a template of pairs: what to look for")


class ScoreRequest(PairsRequest):
    """POST /score: one text_1 (also: queries, data_1) for every text_2 (documents, items, data_2), or as many of each."""

    text_1: Strings
    text_2: Strings

    @model_validator(mode="after")
    def _check_numbers(self) -> ScoreRequest:
        first, second = len(self.text_1), len(self.text_2)
        if first not in (1, second):
            words = f"text_1 must be one text, or as many as text_2 has ({second}), got {first}"
            raise InvalidRequest(words, param="text_1", code="invalid_value")
        return self


class RerankRequest(PairsRequest):
    """POST /rerank."""

    query: str
    documents: Documents
    top_n: Whole | None = Field(None, ge=0, description="how many of the best are told; 0 or none: all")
    return_documents: bool | None = None
    max_tokens_per_doc: Whole | None = Field(None, ge=1, description="longer documents are cut")
