"""`llmd replay`: run the steps of a flight record again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import CommandSpec, hookimpl

if TYPE_CHECKING:
    import click


def _build() -> click.Command:
    from llmd_plugins.commands.replay.command import replay

    return replay


@hookimpl
def llmd_register_commands() -> list[CommandSpec]:
    summary = "Run the steps of a flight record again, offline, on the recorded or another model."
    return [CommandSpec(name="replay", summary=summary, build=_build)]
