"""From a JSON object to a request model: every mistake names its field, and a known but unserved field says so."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llmd.api.v1 import InvalidRequest

_MAX_SHOWN_NAME = 64

# Fields of other servers' requests that are known and not served, and the values of theirs that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "messages": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "add_generation_prompt": (False,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "embedding_types": (["float"],),
    "embedding_type": ("float",),
    "late_chunking": (False,),
    "max_chunks_per_doc": (),
    "rank_fields": (["text"],),
    "mm_processor_kwargs": (),
    "softmax": (),
    "activation": (),
    "truncate": (False, "NONE"),
    "cache_salt": (),
}

Model = TypeVar("Model", bound=BaseModel)


def shown(value: Any) -> str:
    """A value in an error message: short, whatever its size."""
    return reprlib.repr(value)


def parse(model: type[Model], body: Mapping[str, Any]) -> Model:
    """The validated request. Raises InvalidRequest with the path of the first field that is wrong."""
    try:
        return model.model_validate({name: value for name, value in body.items() if _is_served(model, name, value)})
    except ValidationError as error:
        raise _from_validation(error) from None


def check_length(name: str, value: Any, limit: int) -> None:
    """A list has at most `limit` entries; looked at before each entry is. Token ids of one text are no list of texts."""
    if isinstance(value, list) and len(value) > limit and set(map(type, value)) != {int}:
        message = f"{name} has {len(value)} entries, at most {limit} are allowed (limits.max_inputs)"
        raise InvalidRequest(message, param=name, code="invalid_value")


def _is_served(model: type[BaseModel], name: str, value: Any) -> bool:
    """Whether the model declares it; False for what asks for nothing, InvalidRequest for the rest."""
    if name in model.model_fields:
        return True
    if name not in UNSERVED:
        raise _unknown_field(name, model)
    neutral = UNSERVED[name]
    if value is not None and not any(type(value) is type(known) and value == known for known in neutral):
        message = f"{name} is not served by this server, got {shown(value)}"
        raise InvalidRequest(message, param=name, code="unsupported_parameter")
    return False


def _unknown_field(name: str, model: type[BaseModel]) -> InvalidRequest:
    brief = name[:_MAX_SHOWN_NAME]
    close = difflib.get_close_matches(brief, [*model.model_fields, *UNSERVED], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return InvalidRequest(f"unknown field {brief!r}{hint}", param=brief, code="unknown_parameter")


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _from_validation(error: ValidationError) -> InvalidRequest:
    """The first mistake in words; a validator of ours has said it already."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):
        return cause
    path = _path(first["loc"])
    if first["type"] == "missing":
        return InvalidRequest(f"{path} is required", param=path, code="missing_required_parameter")
    words = first["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    return InvalidRequest(f"{path} {words}, got {shown(first['input'])}", param=path, code="invalid_value")
