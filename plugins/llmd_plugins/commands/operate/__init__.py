"""Commands for a running daemon, over its admin socket or a URL: status, top, explain, abort, drain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmd.api.v1 import CommandSpec, hookimpl

if TYPE_CHECKING:
    import click

_SUMMARIES = {
    "status": "Tell how a running daemon is.",
    "top": "Watch a running daemon: requests, tokens a second, KV cache, keys.",
    "explain": "Tell what became of a request, by its id.",
    "abort": "End a running request.",
    "reload": "Let a running daemon read its configuration again.",
    "drain": "Let a running daemon finish its requests and end.",
}


def _builder(name: str) -> Callable[[], click.Command]:
    def build() -> click.Command:
        from llmd_plugins.commands.operate.command import COMMANDS

        return COMMANDS[name]

    return build


@hookimpl
def llmd_register_commands() -> list[CommandSpec]:
    """One for each."""
    return [CommandSpec(name=name, summary=summary, build=_builder(name)) for name, summary in _SUMMARIES.items()]
