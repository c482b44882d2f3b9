"""The author's kit: `check_*` functions that hold a plugin's objects to the contract of their family, and what they need.

Each raises AssertionError with the first thing that is wrong; the built-in plugins pass them too. They run on a CPU, with
random weights and without a network. Fixtures of the same kit come with pytest by themselves (llmd.api.v1.pytest_plugin).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see; a test keeps it equal to _HOMES
    from llmd.api.v1.testing.adapters import check_adapter_format as check_adapter_format
    from llmd.api.v1.testing.architectures import check_architecture as check_architecture
    from llmd.api.v1.testing.attention import check_attention_backend as check_attention_backend
    from llmd.api.v1.testing.driver import StepDriver as StepDriver
    from llmd.api.v1.testing.driver import make_runner as make_runner
    from llmd.api.v1.testing.grammars import check_grammar as check_grammar
    from llmd.api.v1.testing.logits import check_logits_processor as check_logits_processor
    from llmd.api.v1.testing.paged import PagedRows as PagedRows
    from llmd.api.v1.testing.parsers import Parsed as Parsed
    from llmd.api.v1.testing.parsers import check_parser as check_parser
    from llmd.api.v1.testing.parsers import parse as parse
    from llmd.api.v1.testing.quantization import QuantizedWeight as QuantizedWeight
    from llmd.api.v1.testing.quantization import check_quantization as check_quantization
    from llmd.api.v1.testing.serving import Answer as Answer
    from llmd.api.v1.testing.serving import Server as Server
    from llmd.api.v1.testing.serving import Wanted as Wanted
    from llmd.api.v1.testing.serving import check_authenticator as check_authenticator
    from llmd.api.v1.testing.serving import check_route as check_route
    from llmd.api.v1.testing.threads import on_one_thread as on_one_thread
    from llmd.api.v1.testing.tiny_model import make_tiny_model as make_tiny_model
    from llmd.api.v1.testing.verdict import Finding as Finding
    from llmd.api.v1.testing.verdict import Verdict as Verdict
    from llmd.api.v1.testing.verdict import check_plugin as check_plugin

# module → its names: none is imported before one of its names is asked for
_HOMES: dict[str, tuple[str, ...]] = {
    "adapters": ("check_adapter_format",),
    "architectures": ("check_architecture",),
    "attention": ("check_attention_backend",),
    "driver": ("StepDriver", "make_runner"),
    "grammars": ("check_grammar",),
    "logits": ("check_logits_processor",),
    "paged": ("PagedRows",),
    "parsers": ("Parsed", "check_parser", "parse"),
    "quantization": ("QuantizedWeight", "check_quantization"),
    "serving": ("Answer", "Server", "Wanted", "check_authenticator", "check_route"),
    "threads": ("on_one_thread",),
    "tiny_model": ("make_tiny_model",),
    "verdict": ("Finding", "Verdict", "check_plugin"),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> Any:
    """Load a name from its module."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
