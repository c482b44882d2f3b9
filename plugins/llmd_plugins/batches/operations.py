"""The operations of /openapi.json."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import error_responses, json_operation
from llmd_plugins.batches.protocol import BatchRequest

_TAG = "batches"
_FILE = {
    "type": "object",
    "required": ["id", "object", "bytes", "created_at", "filename", "purpose", "status"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "file"},
        "bytes": {"type": "integer"},
        "created_at": {"type": "integer"},
        "filename": {"type": "string"},
        "purpose": {"enum": ["batch", "batch_output"]},
        "status": {"const": "processed"},
    },
}
_BATCH = {
    "type": "object",
    "required": ["id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at", "request_counts"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "batch"},
        "endpoint": {"type": "string"},
        "input_file_id": {"type": "string"},
        "output_file_id": {"type": ["string", "null"]},
        "error_file_id": {"type": ["string", "null"]},
        "completion_window": {"const": "24h"},
        "status": {
            "enum": [
                "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled",
            ]
        },
        "created_at": {"type": "integer"},
        "request_counts": {"type": "object", "required": ["total", "completed", "failed"]},
    },
}  # fmt: skip
_DELETED = {
    "type": "object",
    "required": ["id", "object", "deleted"],
    "properties": {"id": {"type": "string"}, "object": {"const": "file"}, "deleted": {"const": True}},
}


def _paged(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["object", "data", "has_more"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": one},
            "first_id": {"type": ["string", "null"]},
            "last_id": {"type": ["string", "null"]},
            "has_more": {"type": "boolean"},
        },
    }


def _operation(summary: str, schema: dict[str, Any], *statuses: str, name: str | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    responses = {"200": {"description": "done", "content": content}, **error_responses("401", "503", *statuses)}
    operation: dict[str, Any] = {"summary": summary, "tags": [_TAG], "responses": responses, "parameters": []}
    if name is not None:
        schema = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema}]
    return operation


def _page_parameters(limit: int) -> list[dict[str, Any]]:
    return [
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": limit}},
        {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}},
    ]


def upload() -> dict[str, Any]:
    """POST /v1/files."""
    operation = _operation("Upload a file", _FILE, "400", "413", "415")
    form = {
        "type": "object",
        "required": ["purpose", "file"],
        "additionalProperties": False,
        "properties": {"purpose": {"const": "batch"}, "file": {"type": "string", "format": "binary"}},
    }
    operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    return operation


def list_files() -> dict[str, Any]:
    """GET /v1/files."""
    operation = _operation("List the files", _paged(_FILE), "400")
    operation["parameters"] = _page_parameters(10_000)
    return operation


def show_file() -> dict[str, Any]:
    """GET /v1/files/{file_id}."""
    return _operation("Show a file's facts", _FILE, "404", name="file_id")


def delete_file() -> dict[str, Any]:
    """DELETE /v1/files/{file_id}."""
    return _operation("Delete a file", _DELETED, "400", "404", name="file_id")


def file_content() -> dict[str, Any]:
    """GET /v1/files/{file_id}/content."""
    operation = _operation("Download a file", {}, "404", name="file_id")
    operation["responses"]["200"]["content"] = {"application/octet-stream": {"schema": {"type": "string"}}}
    return operation


def create_batch() -> dict[str, Any]:
    """POST /v1/batches."""
    return json_operation("Answer the requests of a file", BatchRequest, _BATCH, tag=_TAG)


def list_batches() -> dict[str, Any]:
    """GET /v1/batches."""
    operation = _operation("List the batches", _paged(_BATCH), "400")
    operation["parameters"] = _page_parameters(100)
    return operation


def show_batch() -> dict[str, Any]:
    """GET /v1/batches/{batch_id}."""
    return _operation("Show how far a batch is", _BATCH, "404", name="batch_id")


def cancel_batch() -> dict[str, Any]:
    """POST /v1/batches/{batch_id}/cancel."""
    return _operation("Stop a batch", _BATCH, "404", name="batch_id")
