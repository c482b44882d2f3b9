"""Which architecture serves a model: the one that knows its name, or the fallback that may know any. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from llmd.errors import ModelError

FALLBACK = "*"  # the name under which an architecture serves what no other one knows


class ArchitectureFacts(Protocol):
    """What is read of an ArchitectureSpec."""

    @property
    def build(self) -> Callable[..., Any]: ...


class Choice(NamedTuple):
    """The spec that serves a model, or why none does."""

    spec: ArchitectureFacts | None
    is_fallback: bool = False
    reasons: tuple[str, ...] = ()  # of the fallback, which was asked and cannot


def choose_architecture(raw: Mapping[str, Any], architectures: Mapping[str, Any], model_impl: str = "auto") -> Choice:
    """Look up config.json's names; `model_impl` 'transformers' asks the fallback only, 'llmd' (or 'vllm') never."""
    names = architecture_names(raw)
    if model_impl != "transformers":
        for name in names:
            if name in architectures and name != FALLBACK:
                return Choice(architectures[name])
    if model_impl not in ("auto", "transformers"):
        return Choice(None)
    if FALLBACK not in architectures:
        return Choice(None, reasons=("no fallback is loaded",) if model_impl == "transformers" else ())
    spec = architectures[FALLBACK]
    why_not = getattr(spec, "why_not", None)
    reasons = tuple(why_not(raw)) if why_not is not None else ()
    return Choice(None, reasons=reasons) if reasons else Choice(spec, is_fallback=True)


def select_architecture(raw: Mapping[str, Any], architectures: Mapping[str, Any], model_impl: str = "auto") -> Choice:
    """The same, where there must be one. Raises ModelError with the names that are known."""
    choice = choose_architecture(raw, architectures, model_impl)
    if choice.spec is not None:
        return choice
    names = " / ".join(architecture_names(raw))
    if model_impl == "transformers":
        raise ModelError(f"architecture {names} cannot run through Transformers: {'; '.join(choice.reasons)}")
    known = ", ".join(sorted(set(architectures) - {FALLBACK})) or "none"
    raise ModelError(
        f"architecture {names} is not known; known are {known}. "
        + (f"The fallback cannot serve it: {'; '.join(choice.reasons)}. " if choice.reasons else "")
        + "A plugin wheel may provide it: install one that registers this architecture"
    )


def spell_config(raw: Mapping[str, Any], architectures: Mapping[str, Any], model_impl: str = "auto") -> Mapping[str, Any]:
    """config.json's content in the words that are read of it, where the architecture has words of its own."""
    spell = getattr(select_architecture(raw, architectures, model_impl).spec, "spell", None)
    return raw if spell is None else spell(raw)


def architecture_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in config.json. Raises ModelError when it has none."""
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"config.json: architectures must be a list of names, got {names!r}")
    return tuple(names)
