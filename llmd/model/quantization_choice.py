"""Which quantization a model gets, as far as config.json tells. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmd.errors import ModelError


def candidates(asked: str | None, settings: Mapping[str, Any] | None, specs: Mapping[str, Any]) -> list[str]:
    """Names of the specs that may serve this checkpoint; the first whose `detect` says so does.

    asked: what `quantization` names. settings: the checkpoint's quantization_config, None where it has none: then the only
    one is the online method that was asked for. Raises ModelError where there is none, or for what one cannot read.
    """
    known = ", ".join(sorted(specs)) or "none"
    if asked is not None and asked not in specs:
        raise ModelError(f"quantization {asked!r} is not known; known are {known}")
    if settings is None:
        if asked is not None and not specs[asked].online:
            raise ModelError(f"quantization {asked!r} needs a checkpoint that is quantized so; this one is not")
        return [] if asked is None else [asked]
    wanted = {name: spec for name, spec in specs.items() if asked in (None, name)}
    names = [name for name, spec in wanted.items() if spec.check is None or spec.check(settings)]
    if not names:
        raise unreadable(asked, settings, specs)
    return names


def unreadable(asked: str | None, settings: Mapping[str, Any], specs: Mapping[str, Any]) -> ModelError:
    """The error for a checkpoint that nothing reads, or not what was asked for."""
    known = ", ".join(sorted(specs)) or "none"
    why = f"is not {asked!r}" if asked else f"no plugin reads; known are {known}"
    return ModelError(f"the checkpoint is quantized by {settings.get('quant_method')!r}, which {why}")
