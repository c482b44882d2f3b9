"""The request of POST /v1/batches as a pydantic model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmd.api.v1 import RequestFields

# known fields that are not served, and the values of theirs that ask for nothing
UNSERVED: dict[str, tuple[()]] = {"output_expires_after": ()}


class BatchRequest(RequestFields):
    """POST /v1/batches."""

    input_file_id: str = Field(max_length=256)
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=16)
