"""The lines of a batch file: what one asks for, and what its answer looks like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import orjson

ENDPOINTS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/score", "/score",
    "/v1/rerank", "/v2/rerank", "/rerank", "/pooling", "/classify",
)  # fmt: skip
# what OpenAI answers in batches and no route here does
UNSERVED_ENDPOINTS = (
    "/v1/moderations", "/v1/images/generations", "/v1/images/edits", "/v1/videos", "/v1/audio/speech",
    "/v1/audio/transcriptions", "/v1/audio/translations",
)  # fmt: skip
MAX_LINE_BYTES = 32 << 20
_MAX_CUSTOM_ID = 512


class LineError(ValueError):
    """A line that is no request."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


class Line(NamedTuple):
    """One request."""

    custom_id: str
    url: str
    body: dict[str, Any]


def parse_line(data: bytes) -> Line:
    """The request of one line. Raises LineError."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise LineError("invalid_json_line", f"the line is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise LineError("invalid_json_line", "the line must be a JSON object")
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID:
        raise LineError("invalid_custom_id", f"custom_id must be a string of 1 to {_MAX_CUSTOM_ID} characters", "custom_id")
    if value.get("method", "POST") != "POST":
        raise LineError("invalid_method", "method must be 'POST'", "method")
    if url not in ENDPOINTS:
        raise LineError("invalid_url", f"url must be one of {', '.join(ENDPOINTS)}, got {str(url)[:80]!r}", "url")
    if not isinstance(body, dict):
        raise LineError("invalid_body", "body must be an object", "body")
    if body.get("stream"):
        raise LineError("invalid_body", "stream is not available in a batch", "body.stream")
    if body.get("background"):
        raise LineError("invalid_body", "background is not available in a batch", "body.background")
    return Line(custom_id, url, body)


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Offsets and bytes of the lines that are not blank."""
    while data := file.readline(MAX_LINE_BYTES):
        if data.strip():
            yield file.tell() - len(data), data


def result_line(custom_id: str, request_id: str, status: int, body: bytes) -> bytes:
    """The line of an answer, whatever its status."""
    try:
        answer: Any = orjson.Fragment(body)
        response = {"status_code": status, "request_id": request_id, "body": answer}
        return orjson.dumps({"id": request_id, "custom_id": custom_id, "response": response, "error": None}) + b"\n"
    except orjson.JSONEncodeError:
        error = {"code": "no_answer", "message": "the answer is not JSON"}
        return orjson.dumps({"id": request_id, "custom_id": custom_id, "response": None, "error": error}) + b"\n"
