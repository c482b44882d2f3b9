"""Any decoder that Hugging Face Transformers can build, over llmd's paged attention: where no plugin knows the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.transformers_model import TransformersDecoder

    return TransformersDecoder(config, layers)


def _why_not(raw: Mapping[str, Any]) -> list[str]:
    from llmd_plugins.architectures.transformers_config import why_not

    return why_not(raw)


def _spell(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    from llmd_plugins.architectures.transformers_config import spell

    return spell(raw)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [
        ArchitectureSpec(
            name="transformers",
            summary="any other decoder that Transformers can build; slower",
            architectures=("*",),
            build=_build,
            why_not=_why_not,
            spell=_spell,
        )
    ]
