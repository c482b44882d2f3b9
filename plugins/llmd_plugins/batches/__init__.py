"""OpenAI's files and batches: many requests in one file, answered when there is room; and `llmd run-batch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmd.api.v1 import CommandSpec, ConfigSectionSpec, RouteSpec, Section, ServiceSpec, hookimpl

if TYPE_CHECKING:
    import click


class BatchesSettings(Section):
    """`[plugins.batches]`."""

    directory: str | None = Field(
        None, description="where files and batches are kept; none: batches/ in $STATE_DIRECTORY or $XDG_STATE_HOME/llmd"
    )
    max_file_bytes: int = Field(200 << 20, ge=1, description="largest uploaded file")
    max_total_bytes: int = Field(4 << 30, ge=1, description="bytes of all files together")
    max_files: int = Field(1000, ge=1, description="files kept")
    max_batches: int = Field(1000, ge=1, description="batches kept; of those that have ended the oldest are forgotten")
    max_requests: int = Field(50_000, ge=1, description="requests in one batch")
    max_concurrent: int = Field(16, ge=1, le=1024, description="requests of batches that run at once")
    priority: int = Field(100, ge=0, lt=1 << 31, description="priority of a batch's requests; lower is served first")


def _made(module: str, name: str) -> Any:
    """A build function that imports a module of this folder when it is called."""

    def build(*arguments: Any) -> Any:
        from importlib import import_module

        return getattr(import_module(f"llmd_plugins.batches.{module}"), name)(*arguments)

    return build


def _run_batch() -> click.Command:
    from llmd_plugins.batches.command import run_batch

    return run_batch


@hookimpl
def llmd_register_commands() -> list[CommandSpec]:
    """The offline form."""
    return [CommandSpec(name="run-batch", summary="Answer a file of requests, without a listener.", build=_run_batch)]


@hookimpl
def llmd_register_config_sections() -> list[ConfigSectionSpec]:
    """What an operator may set."""
    return [ConfigSectionSpec(name="batches", summary="files and batches", model=BatchesSettings)]


@hookimpl
def llmd_register_services() -> list[ServiceSpec]:
    """What works on the batches."""
    return [ServiceSpec(name="batches", summary="answers the requests of batches", build=_made("runner", "run_batches"))]


@hookimpl
def llmd_register_routes() -> list[RouteSpec]:
    """The routes."""
    rows = (
        ("files", "upload", "upload a file", "POST", "/v1/files"),
        ("files", "list_files", "list the files", "GET", "/v1/files"),
        ("files", "show_file", "show a file's facts", "GET", "/v1/files/{file_id}"),
        ("files", "delete_file", "delete a file", "DELETE", "/v1/files/{file_id}"),
        ("files", "file_content", "download a file", "GET", "/v1/files/{file_id}/content"),
        ("routes", "create_batch", "answer the requests of a file", "POST", "/v1/batches"),
        ("routes", "list_batches", "list the batches", "GET", "/v1/batches"),
        ("routes", "show_batch", "show how far a batch is", "GET", "/v1/batches/{batch_id}"),
        ("routes", "cancel_batch", "stop a batch", "POST", "/v1/batches/{batch_id}/cancel"),
    )
    return [
        RouteSpec(
            name=f"batches.{name}", summary=summary, method=method, path=path, build=_made(module, name),
            openapi=_made("operations", name),
        )
        for module, name, summary, method, path in rows
    ]  # fmt: skip
