"""POST /v1/files and what can be done with a file."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from llmd.api.v1 import InvalidRequest, RequestRefused, json_response, receipt_of
from llmd_plugins.batches.pages import page_of
from llmd_plugins.batches.state import State, new_id, shown, state_of

if TYPE_CHECKING:
    from llmd.api.v1 import ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_CHUNK_BYTES = 1 << 20
_MAX_FIELD_BYTES = 4096
_KNOWN = ("purpose", "file", "expires_after", "expires_after[anchor]", "expires_after[seconds]")


def upload(context: ServerContext) -> Handler:
    """The handler of POST /v1/files."""
    state = state_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.content_type != "multipart/form-data":
            message = f"Content-Type must be multipart/form-data, got {request.content_type[:80]!r}"
            raise RequestRefused(415, message, code="unsupported_media_type")
        limit = state.settings.max_file_bytes
        if (request.content_length or 0) > limit + _CHUNK_BYTES:
            raise _too_large(limit)
        folder = state.open() / "files"
        if len(state.records["files"]) >= state.settings.max_files:
            raise _full(f"{state.settings.max_files} files are kept already ([plugins.batches] max_files)")
        file_id = new_id("files")
        draft = folder / f".{file_id}"
        try:
            fields = await _read_form(request, draft, state)
            filename = _check_form(fields)
            record = state.add_file(draft, file_id, receipt_of(request).key, filename, fields["purpose"])
        finally:
            draft.unlink(missing_ok=True)
        return json_response(shown(record))

    return handle


def _too_large(limit: int) -> RequestRefused:
    message = f"the file is larger than {limit} bytes ([plugins.batches] max_file_bytes)"
    return RequestRefused(413, message, code="request_too_large", param="file")


def _full(message: str) -> RequestRefused:
    return RequestRefused(413, f"{message}: delete some", code="storage_full", param="file")


async def _read_form(request: web.Request, draft: Path, state: State) -> dict[str, str]:
    """The form's fields; the file goes to `draft`, and the field has its name."""
    fields: dict[str, str] = {}
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            if not isinstance(part, BodyPartReader) or part.name not in _KNOWN:
                name = str(getattr(part, "name", None))[:64]
                raise InvalidRequest(f"unknown field {name!r}", param=name, code="unknown_parameter")
            if part.name == "file":
                await _write(part, draft, state)
                fields["file"] = (part.filename or "upload")[:255]
            else:
                data = await part.read_chunk(_MAX_FIELD_BYTES)
                fields[part.name] = data.decode("utf-8", "replace")
                await part.release()
    except (ValueError, AssertionError, web.RequestPayloadError, HttpProcessingError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest("the body is not a form that can be read", code="invalid_form") from None
    return fields


async def _write(part: BodyPartReader, draft: Path, state: State) -> None:
    num_bytes, limit = 0, state.settings.max_file_bytes
    room = state.settings.max_total_bytes - state.num_bytes()
    with draft.open("wb") as file:
        while chunk := await part.read_chunk(_CHUNK_BYTES):
            num_bytes += len(chunk)
            if num_bytes > limit:
                raise _too_large(limit)
            if num_bytes > room:
                raise _full("no more bytes can be kept ([plugins.batches] max_total_bytes)")
            await asyncio.to_thread(file.write, chunk)


def _check_form(fields: dict[str, str]) -> str:
    """The file's name. Raises InvalidRequest."""
    for name in ("purpose", "file"):
        if name not in fields:
            raise InvalidRequest(f"{name} is required", param=name, code="missing_required_parameter")
    if fields["purpose"] != "batch":
        message = f"purpose must be 'batch', no other is served, got {fields['purpose'][:64]!r}"
        raise InvalidRequest(message, param="purpose", code="invalid_value")
    if unserved := [name for name in fields if name.startswith("expires_after")]:
        message = f"{unserved[0]} is not served by this server: files stay until they are deleted"
        raise InvalidRequest(message, param=unserved[0], code="unsupported_parameter")
    return fields["file"]


def list_files(context: ServerContext) -> Handler:
    """The handler of GET /v1/files."""
    state = state_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        purpose = request.query.get("purpose")
        return json_response(page_of(state, "files", request, lambda one: purpose in (None, one["purpose"])))

    return handle


def show_file(context: ServerContext) -> Handler:
    """The handler of GET /v1/files/{file_id}."""
    state = state_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        return json_response(shown(_asked(state, request)))

    return handle


def delete_file(context: ServerContext) -> Handler:
    """The handler of DELETE /v1/files/{file_id}."""
    state = state_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        file_id = _asked(state, request)["id"]
        state.delete_file(file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    return handle


def file_content(context: ServerContext) -> Handler:
    """The handler of GET /v1/files/{file_id}/content."""
    state = state_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        path = state.data(_asked(state, request)["id"])
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    return handle


def _asked(state: State, request: web.Request) -> dict[str, Any]:
    return state.get("files", request.match_info["file_id"], receipt_of(request).key)
