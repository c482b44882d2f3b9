"""`llmd plugin`: a new plugin from a working skeleton, and the check of one that is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import CommandSpec, hookimpl

if TYPE_CHECKING:
    import click


def _build() -> click.Command:
    from llmd_plugins.commands.plugin.command import plugin_group

    return plugin_group


@hookimpl
def llmd_register_commands() -> list[CommandSpec]:
    """The author's commands."""
    return [CommandSpec(name="plugin", summary="Begin a plugin of your own, or check one.", build=_build)]
