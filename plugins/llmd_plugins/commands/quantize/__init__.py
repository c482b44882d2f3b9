"""`llmd quantize`: a checkpoint of fewer bits, calibrated on text, that llmd, transformers and vLLM read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import CommandSpec, hookimpl

if TYPE_CHECKING:
    import click


def _build() -> click.Command:
    from llmd_plugins.commands.quantize.command import quantize

    return quantize


@hookimpl
def llmd_register_commands() -> list[CommandSpec]:
    summary = "Write a quantized copy of a model: GPTQ, AWQ, int8 or fp8."
    return [CommandSpec(name="quantize", summary=summary, build=_build)]
