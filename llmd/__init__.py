"""llmd: a serving daemon for language models. Importing it is quick; its names load what they need."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from llmd._version import __version__

# Read once, when torch loads its OpenMP runtime, which nothing here does before this line: threads that wait for work spin,
# and those that spin for long starve whatever shares the cores with them, the event loop first. Who says otherwise is heard.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from llmd.daemon import serve
    from llmd.engine.params import BeamSearchParams, PoolingParams, SamplingParams, StructuredOutputsParams
    from llmd.offline import LLM, AsyncLLM, LoRARequest

__all__ = [
    "LLM", "AsyncLLM", "BeamSearchParams", "LoRARequest", "PoolingParams", "SamplingParams", "StructuredOutputsParams",
    "__version__", "serve",
]  # fmt: skip

_HOME = {
    "AsyncLLM": "llmd.offline",
    "BeamSearchParams": "llmd.engine.params",
    "LLM": "llmd.offline",
    "LoRARequest": "llmd.offline",
    "PoolingParams": "llmd.engine.params",
    "SamplingParams": "llmd.engine.params",
    "StructuredOutputsParams": "llmd.engine.params",
    "serve": "llmd.daemon",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
