"""`bad_words`: strings that must not be generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import LogitsProcessorSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import LogitsContext, LogitsProcessor


def _build(context: LogitsContext) -> LogitsProcessor:
    from llmd_plugins.sampling.bad_words.processor import BadWords

    return BadWords(context)


@hookimpl
def llmd_register_logits_processors() -> list[LogitsProcessorSpec]:
    summary = "Keep the strings of bad_words from being generated"
    return [LogitsProcessorSpec(name="bad_words", summary=summary, build=_build)]
