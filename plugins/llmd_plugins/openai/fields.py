"""From a JSON object to a request model: every mistake names its field, and a known but unserved field says so."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llmd.api.v1 import InvalidRequest

_MAX_SHOWN_NAME = 64


class Neutral:
    """The values of an unserved field that ask for nothing; null always does."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __contains__(self, value: Any) -> bool:
        return value is None or any(type(value) is type(neutral) and value == neutral for neutral in self.values)


_NOTHING = Neutral()

# Fields of OpenAI's or vLLM's requests that are known and not served, some by one of the routes only, and the values of
# theirs that do no harm.
UNSERVED: dict[str, Neutral] = {
    "guided_whitespace_pattern": _NOTHING,
    "structural_tag": _NOTHING,
    "suffix": Neutral(""),
    "reasoning": _NOTHING,
    "reasoning_effort": Neutral("none"),
    "include_reasoning": Neutral(True),
    "thinking_token_budget": _NOTHING,
    "modalities": Neutral(["text"]),
    "audio": _NOTHING,
    "prediction": _NOTHING,
    "web_search_options": _NOTHING,
    "verbosity": Neutral("medium"),
    "tools": _NOTHING,
    "tool_choice": Neutral("none"),
    "parallel_tool_calls": Neutral(True, False),
    "functions": _NOTHING,
    "function_call": Neutral("none"),
    "logits_processors": _NOTHING,
    "prompt_embeds": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
    "media_io_kwargs": _NOTHING,
    "kv_transfer_params": _NOTHING,
    "vllm_xargs": _NOTHING,
    "logprob_token_ids": _NOTHING,
}

Model = TypeVar("Model", bound=BaseModel)


def shown(value: Any) -> str:
    """A value in an error message: short, whatever its size."""
    return reprlib.repr(value)


def field_path(location: tuple[int | str, ...]) -> str:
    """`messages[2].content`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def parse(model: type[Model], body: Mapping[str, Any]) -> Model:
    """The validated request. Raises InvalidRequest with the path of the first field that is wrong."""
    served = _served_fields(model, body)
    try:
        return model.model_validate(served)
    except ValidationError as error:
        raise _from_validation(error) from None


def _served_fields(model: type[BaseModel], body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the model declares; the others are refused by name unless they ask for nothing."""
    served = {}
    for name, value in body.items():
        if name in model.model_fields:
            served[name] = value
        elif name not in UNSERVED:
            raise _unknown_field(name, model)
        elif value not in UNSERVED[name]:
            raise InvalidRequest(
                f"{name} is not served by this server, got {shown(value)}", param=name, code="unsupported_parameter"
            )
    return served


def _unknown_field(name: str, model: type[BaseModel]) -> InvalidRequest:
    close = difflib.get_close_matches(name[:_MAX_SHOWN_NAME], [*model.model_fields, *UNSERVED], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    brief = name[:_MAX_SHOWN_NAME]
    return InvalidRequest(f"unknown field {brief!r}{hint}", param=brief, code="unknown_parameter")


def _from_validation(error: ValidationError) -> InvalidRequest:
    """The first mistake in words; a validator of ours has said it already."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):
        return cause
    path = field_path(first["loc"])
    if first["type"] == "missing":
        return InvalidRequest(f"{path} is required", param=path, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {path!r}", param=path, code="unknown_parameter")
    words = first["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    return InvalidRequest(f"{path} {words}, got {shown(first['input'])}", param=path, code="invalid_value")
