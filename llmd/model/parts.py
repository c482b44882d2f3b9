"""What the model layer is handed by whoever knows the plugins. Loads no torch: an executor may run in another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmd.config import AdaptersConfig
from llmd.model.attention import AttentionNeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """What the model layer needs of the catalog, each family by name; architectures by the names in config.json."""

    architectures: Mapping[str, Any] = field(default_factory=dict)
    quantizations: Mapping[str, Any] = field(default_factory=dict)
    attention_backends: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_formats: Mapping[str, Any] = field(default_factory=dict)
    logits_processors: Mapping[str, Any] = field(default_factory=dict)
    samplers: Mapping[str, Any] = field(default_factory=dict)
    adapter_formats: Mapping[str, Any] = field(default_factory=dict)
    adapters: AdaptersConfig | None = None  # none, or not enabled: no layer has slots
    select_attention_backend: Callable[[AttentionNeeds, Sequence[str]], str | None] | None = None
