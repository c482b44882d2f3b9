"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import AdapterFormatSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import AdapterFormat


def _build() -> AdapterFormat:
    from llmd_plugins.adapters.peft_files import PeftFormat

    return PeftFormat()


@hookimpl
def llmd_register_adapter_formats() -> list[AdapterFormatSpec]:
    """The format of PEFT."""
    return [AdapterFormatSpec(name="peft", summary="LoRA and DoRA as PEFT saves them", build=_build)]
