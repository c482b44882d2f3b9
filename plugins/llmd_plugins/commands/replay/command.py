"""The `llmd replay` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmd.api.v1 import read_flight, replay_flight

if TYPE_CHECKING:
    from llmd.api.v1 import Replayed

_SHOWN = 20


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="'demo', a folder, or a hub name.  [default: the recorded one]")
@click.option("--load-format", default="auto", show_default=True, help="dummy: random weights.")
@click.option("--device", help="cpu, cuda …  [default: what the machine has]")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--max-model-len", type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def replay(ctx: click.Context, /, file: Path, as_json: bool, **options: Any) -> None:
    """Run the steps recorded in FILE again, one after the other.

    Says whether the recorded plans agree with themselves, which steps fail here too and, where token ids were recorded
    (health.flight_tokens) and the model is the same, where the first other token was sampled. Without token ids the same
    shapes are computed over made-up ones. Exit 0: all the same; 1: something differs.
    """
    content = read_flight(file)
    options["model"] = options["model"] or content.get("model") or "demo"
    found = replay_flight(content, {name: value for name, value in options.items() if value is not None})
    click.echo(json.dumps(_facts(content, found)) if as_json else "\n".join(_lines(content, found)))
    ctx.exit(0 if found.is_same else 1)


def _facts(content: dict[str, Any], found: Replayed) -> dict[str, Any]:
    divergences = [divergence._asdict() for divergence in found.divergences]
    return {"reason": content.get("reason"), "is_same": found.is_same, **found._asdict(), "divergences": divergences}


def _lines(content: dict[str, Any], found: Replayed) -> list[str]:
    told = (content.get("error") or "").strip().rpartition("\n")[2]
    lines = [f"recorded by llmd {content.get('version')} because of {content.get('reason')}{': ' + told if told else ''}"]
    steps = f"{found.num_steps} of {len(content['steps'])} steps, {found.num_tokens} tokens, {found.elapsed_s:.2f} s"
    lines += [f"ran again: {steps}", f"plans: {len(found.problems) or 'no'} contradictions", *found.problems[:_SHOWN]]
    lines += [f"steps that fail here: {len(found.failures) or 'none'}", *found.failures[:_SHOWN]]
    if not found.compared:
        return [*lines, "tokens: not compared (none recorded, or another model)"]
    lines.append(f"tokens: {found.compared} compared, {len(found.divergences) or 'no'} rows diverge")
    for step_id, row, then, now in found.divergences[:_SHOWN]:
        lines.append(f"step {step_id}, row {row}: {then} then, {now} now")
    return lines
