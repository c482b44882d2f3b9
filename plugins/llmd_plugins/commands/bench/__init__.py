"""`llmd bench`: measure a server over HTTP, or the engine in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import CommandSpec, hookimpl

if TYPE_CHECKING:
    import click


def _build() -> click.Command:
    from llmd_plugins.commands.bench.command import bench

    return bench


@hookimpl
def llmd_register_commands() -> list[CommandSpec]:
    summary = "Measure a server over HTTP (serve), or the engine in this process (throughput, latency)."
    return [CommandSpec(name="bench", summary=summary, build=_build)]
