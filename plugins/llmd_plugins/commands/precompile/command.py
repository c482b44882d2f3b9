"""The `llmd precompile` command."""

from __future__ import annotations

import os
import sys
import threading

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_file", metavar="FILE", help="The configuration file (TOML).")
@click.option("--device", default="auto", show_default=True, help="sm_90, gfx942 …, or this machine's (auto).")
@click.option("--threads", type=click.IntRange(1, 4096), help="That compile.  [default: one a CPU]")
@click.option("--beside", is_flag=True, hidden=True)
@click.pass_context
def precompile(ctx: click.Context, config_file: str | None, device: str, threads: int | None, beside: bool) -> None:
    """Compile every kernel that the models of a configuration launch on a GPU.

    They go to Triton's cache (TRITON_CACHE_DIR). Run where an image is built, with config.json in the model's folder and no
    GPU, this makes the first start as quick as any other. A GPU with fewer multiprocessors than its kind usually
    has is named with their number, such as sm_90:114.
    """
    from llmd.api.v1 import precompile as compile_models

    config_file = config_file or (ctx.parent.params.get("config_file") if ctx.parent else None)
    if beside:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    for done in compile_models(config_file, device, num_threads=threads, started=_tell_started if beside else _nothing):
        for failure in done.compiled.failures:
            click.echo(f"cannot be compiled: {failure}", err=True)
        click.echo(str(done))


def _nothing() -> None:
    """Nobody waits."""


def _tell_started() -> None:
    """The daemon goes on, and what is left to do must not be in its way."""
    click.echo("kernels of the first steps are compiled")
    sys.stdout.flush()
    os.nice(10)


def _end_with_parent() -> None:
    """The daemon holds the other end of stdin, and writes nothing."""
    os.read(sys.stdin.fileno(), 1)  # not through its buffer, whose lock the interpreter wants when it ends
    os._exit(0)
