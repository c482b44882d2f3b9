"""From a JSON object to a request model: every mistake names its field, and a known but unserved field says so."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from llmd.errors import InvalidRequest

MAX_SHOWN_NAME = 64

Model = TypeVar("Model", bound=BaseModel)


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 63 else value


Whole = Annotated[int, BeforeValidator(_whole)]


class RequestFields(BaseModel):
    """A request, or an object in one: no conversion of types, no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def shown(value: Any) -> str:
    """A value in an error message: short, whatever its size."""
    return reprlib.repr(value)


def wrong_value(path: str, allowed: str, value: Any) -> InvalidRequest:
    """The error for a value that is none of those allowed."""
    return InvalidRequest(f"{path} must be {allowed}, got {shown(value)}", param=path, code="invalid_value")


def string_at(path: str, value: Any) -> str:
    """The value, a string. Raises InvalidRequest."""
    if not isinstance(value, str):
        raise wrong_value(path, "a string", value)
    return value


def object_at(path: str, value: Any) -> dict[str, Any]:
    """The value, an object. Raises InvalidRequest."""
    if not isinstance(value, dict):
        raise wrong_value(path, "an object", value)
    return value


def list_at(path: str, value: Any, limit: int) -> list[Any]:
    """The value, a list of at most `limit` entries. Raises InvalidRequest."""
    if not isinstance(value, list):
        raise wrong_value(path, "a list", value)
    if len(value) > limit:
        raise InvalidRequest(f"{path} must have at most {limit} entries, got {len(value)}", param=path)
    return value


def check_field_names(path: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse fields that are not known, unless they are null."""
    for name, value in given.items():
        if name not in known and value is not None:
            raise _unknown(name, known, f"{path}.")


def parse_request(model: type[Model], given: Mapping[str, Any], unserved: Mapping[str, Collection[Any]]) -> Model:
    """The validated request. `unserved` names known fields and their values that ask for nothing, as null always does."""
    served = {}
    for name, value in given.items():
        if name in model.model_fields:
            served[name] = value
        elif name not in unserved:
            raise _unknown(name, [*model.model_fields, *unserved])
        elif value is not None and not any(type(value) is type(one) and value == one for one in unserved[name]):
            message = f"{name} is not served by this server, got {shown(value)}"
            raise InvalidRequest(message, param=name, code="unsupported_parameter")
    try:
        return model.model_validate(served)
    except ValidationError as error:
        raise _from_validation(error) from None


def _unknown(name: str, known: Collection[str], where: str = "") -> InvalidRequest:
    brief = name[:MAX_SHOWN_NAME]
    close = difflib.get_close_matches(brief, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    path = f"{where}{brief}"
    return InvalidRequest(f"unknown field {path!r}{hint}", param=path, code="unknown_parameter")


def field_path(location: tuple[int | str, ...]) -> str:
    """`messages[2].content`."""
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
    path = field_path(first["loc"])
    if first["type"] == "missing":
        return InvalidRequest(f"{path} is required", param=path, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {path!r}", param=path, code="unknown_parameter")
    words = first["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    return InvalidRequest(f"{path} {words}, got {shown(first['input'])}", param=path, code="invalid_value")
