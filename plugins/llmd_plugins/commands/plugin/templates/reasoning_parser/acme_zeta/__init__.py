"""Reasoning between `<zeta>` and `</zeta>`, in front of the answer."""

from llmd.api.v1 import ParserSpec, ThinkingParser, hookimpl


class ZetaParser(ThinkingParser):
    """The opening tag may stand at the end of the prompt instead, as chat templates like to write it."""

    OPENS = ("<zeta>",)
    CLOSES = ("</zeta>",)


@hookimpl
def llmd_register_reasoning_parsers() -> list[ParserSpec]:
    return [ParserSpec(name="zeta", summary="<zeta>…</zeta>", build=ZetaParser)]
