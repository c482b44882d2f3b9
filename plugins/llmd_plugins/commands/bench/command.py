"""The `llmd bench` group."""

from __future__ import annotations

import click

from llmd_plugins.commands.bench.offline import latency, throughput
from llmd_plugins.commands.bench.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure a server over HTTP (serve), or the engine in this process (throughput, latency)."""


bench.add_command(serve)
bench.add_command(throughput)
bench.add_command(latency)
