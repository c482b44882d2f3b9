"""Every hook of llmd, in the order of the daemon's life: this file is the architecture page.

Hooks are called at start-up or at the edge of a request, never inside a step. Register hooks return a list of specs;
`select`/`resolve` hooks are asked one by one and the first answer that is not None counts. An argument may be added to a
hook in any release (an implementation names only those it takes); removing one is API v2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from llmd.plugin.specs import (
    AdapterFormatSpec,
    ArchitectureSpec,
    AttentionBackendSpec,
    AttentionNeeds,
    AuthenticatorSpec,
    CheckpointFormatSpec,
    CommandSpec,
    ConfigSectionSpec,
    ExecutorSpec,
    GrammarSpec,
    KVStoreSpec,
    LogitsProcessorSpec,
    MetricsSpec,
    MiddlewareSpec,
    ModelSourceSpec,
    ParserSpec,
    ProposerSpec,
    QuantizationSpec,
    RequestSummary,
    RouteSpec,
    SamplerSpec,
    SchedulingPolicySpec,
    ServiceSpec,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from llmd.config import AdaptersConfig, Config

hookspec = pluggy.HookspecMarker("llmd")

# --- the command line and the configuration


@hookspec
def llmd_register_commands() -> list[CommandSpec]:
    """Commands of the `llmd` program."""
    return []


@hookspec
def llmd_register_config_sections() -> list[ConfigSectionSpec]:
    """Sections `[plugins.<name>]` of the configuration file."""
    return []


# --- finding and loading a model


@hookspec
def llmd_register_model_sources() -> list[ModelSourceSpec]:
    """Places that model files come from."""
    return []


@hookspec
def llmd_register_checkpoint_formats() -> list[CheckpointFormatSpec]:
    """File formats of weights."""
    return []


@hookspec
def llmd_register_architectures() -> list[ArchitectureSpec]:
    """Model architectures, by their names in config.json."""
    return []


@hookspec
def llmd_register_quantizations() -> list[QuantizationSpec]:
    """Quantization methods, by their names in quantization_config and --quantization."""
    return []


@hookspec
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    """Ways to compute attention over the paged KV cache."""
    return []


@hookspec(firstresult=True)
def llmd_select_attention_backend(needs: AttentionNeeds, usable: Sequence[str]) -> str | None:
    """Name the attention backend to take among the usable ones, or None to leave the choice to their priority."""


@hookspec
def llmd_register_adapter_formats() -> list[AdapterFormatSpec]:
    """File formats of adapters."""
    return []


@hookspec
def llmd_register_kv_stores() -> list[KVStoreSpec]:
    """Tiers below the device's KV pool."""
    return []


# --- running steps


@hookspec
def llmd_register_executors() -> list[ExecutorSpec]:
    """Ways to drive one or many devices."""
    return []


@hookspec
def llmd_register_scheduling_policies() -> list[SchedulingPolicySpec]:
    """Orders of the waiting queue."""
    return []


@hookspec
def llmd_register_logits_processors() -> list[LogitsProcessorSpec]:
    """Steps between logits and sampling."""
    return []


@hookspec
def llmd_register_samplers() -> list[SamplerSpec]:
    """Ways to turn logits into tokens."""
    return []


@hookspec
def llmd_register_proposers() -> list[ProposerSpec]:
    """Drafters for speculative decoding."""
    return []


@hookspec
def llmd_register_grammars() -> list[GrammarSpec]:
    """Compilers of structured-output constraints."""
    return []


# --- reading what the model wrote


@hookspec
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Parsers that find tool calls in generated text."""
    return []


@hookspec
def llmd_register_reasoning_parsers() -> list[ParserSpec]:
    """Parsers that split reasoning from content."""
    return []


@hookspec(firstresult=True)
def llmd_select_parsers(model: Mapping[str, Any]) -> tuple[str | None, str | None] | None:
    """Name the (tool, reasoning) parsers that fit a model by its facts, or None when it is unknown."""


# --- serving


@hookspec
def llmd_register_authenticators() -> list[AuthenticatorSpec]:
    """Ways to tell who asks."""
    return []


@hookspec
def llmd_register_middlewares() -> list[MiddlewareSpec]:
    """What wraps every HTTP request."""
    return []


@hookspec
def llmd_register_routes() -> list[RouteSpec]:
    """HTTP routes."""
    return []


@hookspec
def llmd_register_metrics() -> list[MetricsSpec]:
    """Collectors for /metrics."""
    return []


@hookspec
def llmd_register_services() -> list[ServiceSpec]:
    """What runs beside the server from start to stop."""
    return []


@hookspec(firstresult=True)
def llmd_resolve_adapter(name: str, config: AdaptersConfig) -> str | None:
    """Find an adapter that is not loaded: the path of its folder, or None when it is not ours."""


@hookspec
def llmd_reloaded(config: Config, sections: Mapping[str, Any]) -> None:
    """The configuration was reloaded: `sections` are the plugins' settings as they are now."""


@hookspec
def llmd_request_finished(summary: RequestSummary) -> None:
    """A request ended, however it ended."""
