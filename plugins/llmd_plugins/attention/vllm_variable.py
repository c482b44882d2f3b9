"""VLLM_ATTENTION_BACKEND, by which users of vLLM choose: a usable backend of that name is taken."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from llmd.api.v1 import hookimpl

log = logging.getLogger(__name__)

VARIABLE = "VLLM_ATTENTION_BACKEND"


@hookimpl
def llmd_select_attention_backend(usable: Sequence[str]) -> str | None:
    """The backend that the variable names (TRITON_ATTN is triton, FLASH_ATTN the latest release), if it is usable here."""
    wanted = os.environ.get(VARIABLE, "")
    if not wanted:
        return None
    name = wanted.lower()
    for candidate in (f"{name}_3", name, name.removesuffix("_attn")):
        if candidate in usable:
            return candidate
    log.warning("%s=%s names no attention backend that is usable here; usable: %s", VARIABLE, wanted, ", ".join(usable))
    return None
