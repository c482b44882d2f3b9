"""No token twice in a row, for requests with the largest frequency_penalty (2)."""

from llmd.api.v1 import LogitsContext, LogitsProcessor, LogitsProcessorSpec, hookimpl


def _build(context: LogitsContext) -> LogitsProcessor:
    from acme_zeta.processor import Zeta

    return Zeta()


@hookimpl
def llmd_register_logits_processors() -> list[LogitsProcessorSpec]:
    return [LogitsProcessorSpec(name="zeta", summary="no token twice in a row", build=_build)]
