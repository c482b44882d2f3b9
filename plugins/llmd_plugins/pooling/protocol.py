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
    truncate_prompt_tokens: Whole | None = Field(None, ge=-1, description="keep the first so many tokens; -1: the context")

    @model_validator(mode="after")
    def _check_truncation(self) -> Common:
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest("truncate_prompt_tokens must be -1 or at least 1, got 0", param="truncate_prompt_tokens")
        return self


class TextsRequest(Common):
    """What those have that take texts."""

    input: Texts
    add_special_tokens: bool = True


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


class ScoreRequest(Common):
    """POST /score: one text_1 for every text_2, or as many of each."""

    text_1: Strings
    text_2: Strings
    use_activation: bool | None = None

    @model_validator(mode="after")
    def _check_numbers(self) -> ScoreRequest:
        first, second = len(self.text_1), len(self.text_2)
        if first not in (1, second):
            words = f"text_1 must be one text, or as many as text_2 has ({second}), got {first}"
            raise InvalidRequest(words, param="text_1", code="invalid_value")
        return self


class RerankRequest(Common):
    """POST /rerank."""

    query: str
    documents: Documents
    top_n: Whole | None = Field(None, ge=0, description="how many of the best are told; 0 or none: all")
    return_documents: bool | None = None
    max_tokens_per_doc: Whole | None = Field(None, ge=1, description="longer documents are cut")
    use_activation: bool | None = None
