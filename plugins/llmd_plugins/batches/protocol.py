"""The request of POST /v1/batches as a pydantic model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class BatchRequest(BaseModel):
    """POST /v1/batches."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    input_file_id: str = Field(max_length=256)
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=16)
