"""The `llmd plugin` commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llmd.api.v1.testing import Verdict, check_plugin
from llmd_plugins.commands.plugin.skeleton import check_kind, check_name, write


@click.group("plugin", context_settings={"help_option_names": ["-h", "--help"]})
def plugin_group() -> None:
    """Begin a plugin of your own, or check one that is installed."""


@plugin_group.command("new")
@click.argument("kind")
@click.argument("name")
@click.option("--into", type=click.Path(path_type=Path), help="The folder to write.  [default: ./NAME]")
def new_command(kind: str, name: str, into: Path | None) -> None:
    """Write a working plugin of KIND as the distribution NAME, with its tests.

    KIND is architecture, quantization, attention-backend, adapter-format, grammar, tool-parser, reasoning-parser,
    logits-processor, authenticator or route.
    """
    check_kind(kind)
    check_name(name)
    folder = into or Path(name)
    for path in write(kind, name, folder):
        click.echo(path)
    click.echo(f"next: cd {folder} && pip install -e '.[test]' && pytest")


@plugin_group.command("check")
@click.argument("name", metavar="[DIST]", required=False)
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the verdict there too.")
@click.pass_context
def check_command(ctx: click.Context, name: str | None, file: Path | None) -> None:
    """Load one plugin alone and hold all that it provides to the contract.

    DIST is a distribution or one of its plugins; without it the only one that is installed beside llmd is taken.

    Exit 0: nothing is wrong; 1: something is. What needs more than the plugin tells (a checkpoint, a key) is skipped: its
    own tests call the check_* functions of llmd.api.v1.testing.
    """
    verdict = check_plugin(name)
    for line in _table(verdict):
        click.echo(line)
    if file is not None:
        file.write_text(json.dumps(verdict.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    ctx.exit(0 if verdict.is_good else 1)


def _table(verdict: Verdict) -> list[str]:
    rows: list[Any] = [("WHAT", "CHECK", "RESULT", ""), *((f.what, f.check, f.result, f.detail) for f in verdict.findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    ]
    counts = {result: sum(f.result == result for f in verdict.findings) for result in ("passed", "failed", "skipped")}
    told = ", ".join(f"{count} {result}" for result, count in counts.items())
    return [*lines, f"{verdict.distribution} {verdict.version} with llmd {verdict.llmd}: {told}"]
