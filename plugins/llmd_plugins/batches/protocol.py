"""The request of POST /v1/batches as a pydantic model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from llmd.api.v1 import InvalidRequest, RequestFields, wrong_value
from llmd_plugins.batches.lines import ENDPOINTS, UNSERVED_ENDPOINTS

# known fields that are not served, and the values of theirs that ask for nothing
UNSERVED: dict[str, tuple[()]] = {"output_expires_after": ()}


def _parse_endpoint(value: Any) -> str:
    """The one path that all lines ask. Raises InvalidRequest."""
    if isinstance(value, str) and value in ENDPOINTS:
        return value
    if isinstance(value, str) and value in UNSERVED_ENDPOINTS:
        message = f"endpoint {value!r} is not served by this server; served are {', '.join(ENDPOINTS)}"
        raise InvalidRequest(message, param="endpoint", code="unsupported_parameter")
    raise wrong_value("endpoint", f"one of {', '.join(ENDPOINTS)}", value)


class BatchRequest(RequestFields):
    """POST /v1/batches."""

    input_file_id: str = Field(max_length=256)
    endpoint: Annotated[str, PlainValidator(_parse_endpoint), WithJsonSchema({"enum": list(ENDPOINTS)})]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=16)
