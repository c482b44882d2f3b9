"""`llmd precompile`: every kernel of a configuration's models, compiled before a GPU is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import CommandSpec, hookimpl

if TYPE_CHECKING:
    import click


def _build() -> click.Command:
    from llmd_plugins.commands.precompile.command import precompile

    return precompile


@hookimpl
def llmd_register_commands() -> list[CommandSpec]:
    summary = "Compile the models' kernels for a GPU, here or not."
    return [CommandSpec(name="precompile", summary=summary, build=_build)]
