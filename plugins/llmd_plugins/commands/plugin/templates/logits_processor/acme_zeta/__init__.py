"""No token twice in a row, for requests with the largest frequency_penalty (2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import LogitsProcessorSpec, hookimpl

if TYPE_CHECKING:  # their modules load torch
    from llmd.api.v1 import LogitsContext, LogitsProcessor


def _build(context: LogitsContext) -> LogitsProcessor:
    from acme_zeta.processor import Zeta

    return Zeta()


@hookimpl
def llmd_register_logits_processors() -> list[LogitsProcessorSpec]:
    return [LogitsProcessorSpec(name="zeta", summary="no token twice in a row", build=_build)]
