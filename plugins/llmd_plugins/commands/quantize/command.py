"""The `llmd quantize` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

METHODS = ("gptq", "awq", "int8", "fp8")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--method", type=click.Choice(METHODS), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Of gptq; awq has 4.")
@click.option("--group-size", type=int, default=128, show_default=True, help="32, 64, 128, or -1: a scale a row.")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to calibrate gptq and awq on: lines of .txt, or .jsonl with text or messages.",
)
@click.option("--num-samples", type=click.IntRange(1, 65536), default=128, show_default=True)
@click.option("--sample-length", type=click.IntRange(16, 1 << 17), default=512, show_default=True, help="Tokens a sample.")
@click.option("--desc-act", is_flag=True, help="gptq: columns in the order of their weight in the output; slower to serve.")
@click.option(
    "--damp",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.05,
    show_default=True,
    help="gptq: of the mean of the Hessian's diagonal, added to it.",
)
@click.option("--max-shard-bytes", type=click.IntRange(1 << 20), default=1 << 30, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …")
def quantize(model: str, output: Path, bits: str, **options: Any) -> None:
    """Write a quantized copy of MODEL ('demo', a folder, or a hub name) to a folder.

    gptq and awq need --data: text like what the model will see. int8 and fp8 need none: inputs are scaled as they come.
    Layers are loaded, quantized and written one after another, so that memory holds one layer, the samples and a
    shard.
    """
    from llmd_plugins.commands.quantize.run import Settings, run

    settings = Settings(bits=int(bits), **options)
    summary = run(model, output, settings, lambda line: click.echo(line, err=True))
    click.echo(summary)
