"""Constraints of kind "choice": the answer is one of a list of strings."""

from llmd.api.v1 import GrammarCompiler, GrammarContext, GrammarSpec, hookimpl


def _build(context: GrammarContext) -> GrammarCompiler:
    from acme_zeta.choices import Compiler

    return Compiler(context)


@hookimpl
def llmd_register_grammars() -> list[GrammarSpec]:
    return [GrammarSpec(name="zeta", summary="one of several strings", build=_build, kinds=("choice",), order=500)]
