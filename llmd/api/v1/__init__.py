"""Version 1 of the plugin API: all that a plugin may import, each name loaded from its home when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pluggy

hookimpl = pluggy.HookimplMarker("llmd")

# name → the module where it lives; torch and aiohttp are imported only by who asks for names that need them
_HOMES: dict[str, str] = {
    **dict.fromkeys(
        [
            "AdapterFormatSpec", "ArchitectureSpec", "AttentionBackendSpec", "AttentionNeeds", "AuthenticatorSpec",
            "CheckpointFormatSpec", "CommandSpec", "ConfigSectionSpec", "ExecutorSpec", "GrammarSpec", "KVStoreSpec",
            "LogitsProcessorSpec", "MetricsSpec", "MiddlewareSpec", "ModelSourceSpec", "ParserSpec", "ProposerSpec",
            "QuantizationSpec", "RequestSummary", "RouteSpec", "SamplerSpec", "SchedulingPolicySpec", "ServiceSpec", "Spec",
        ],
        "llmd.plugin.specs",
    ),
    **dict.fromkeys(
        [
            "ConfigError", "EngineFailure", "InvalidParams", "InvalidRequest", "LlmdError", "ModelError", "ModelNotFound",
            "NotReady", "Overloaded", "StepFailed",
        ],
        "llmd.errors",
    ),
    **dict.fromkeys(["Config", "ModelConfig", "SchedulerConfig", "ServerConfig", "LimitsConfig", "Section"], "llmd.config"),
    **dict.fromkeys(["SamplingParams", "PoolingParams"], "llmd.engine.params"),
    **dict.fromkeys(["Prompt", "Request", "Span"], "llmd.engine.request"),
    **dict.fromkeys(
        ["BlockUpdate", "FinishReason", "RowAdmit", "SequenceDelta", "StepPlan", "StepResult", "TokenLogprobs"],
        "llmd.engine.step",
    ),
    **dict.fromkeys(["Executor", "ExecutorInfo", "KVGroup", "LoadProgress"], "llmd.engine.executor"),
    "Sequence": "llmd.engine.sequence",
    "WaitingQueue": "llmd.engine.queue",
}  # fmt: skip

__all__ = ["hookimpl", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise ImportError(f"llmd.api.v1 has no {name!r}: this plugin needs another version of llmd")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
