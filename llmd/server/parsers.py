"""Which parsers read what a model writes: named in the configuration, or chosen by its chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmd.config import ModelConfig
from llmd.errors import ConfigError

if TYPE_CHECKING:
    from llmd.plugin.specs import ParserSpec
    from llmd.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

Facts = Mapping[str, Any]
Choice = tuple[str | None, str | None]  # a tool parser's name and a reasoning parser's


@dataclass(frozen=True, slots=True)
class ParserParts:
    """What the catalog has: specs by name, and who names the two that fit a model."""

    tools: Mapping[str, ParserSpec] = field(default_factory=dict)
    reasoning: Mapping[str, ParserSpec] = field(default_factory=dict)
    select: Callable[[Facts], Choice | None] = lambda facts: None


@dataclass(frozen=True, slots=True)
class ModelParsers:
    """The parsers of one model; None where it has none."""

    tool: ParserSpec | None = None
    reasoning: ParserSpec | None = None


def choose_parsers(parts: ParserParts, config: ModelConfig, facts: Facts) -> ModelParsers:
    """The configured parsers, or for "auto" those that fit the facts. Raises ConfigError for a name that is none."""
    fitting = parts.select(facts) or (None, None)
    return ModelParsers(
        _chosen("tool_call_parser", config.tool_call_parser, fitting[0], parts.tools),
        _chosen("reasoning_parser", config.reasoning_parser, fitting[1], parts.reasoning),
    )


def _chosen(key: str, configured: str, fitting: str | None, specs: Mapping[str, ParserSpec]) -> ParserSpec | None:
    if configured == "none":
        return None
    if configured != "auto":
        if configured not in specs:
            raise ConfigError(f"models.{key}: {configured!r} is no parser; known: auto, none, {', '.join(sorted(specs))}")
        return specs[configured]
    if fitting is not None and fitting not in specs:
        logger.warning("%s: %s would fit the chat template, and no plugin offers it", key, fitting)
    return specs.get(fitting) if fitting is not None else None


def model_facts(config: ModelConfig, path: Path, template: ChatTemplate) -> dict[str, Any]:
    """What `llmd_select_parsers` is told of a model: its name, chat_template, model_type and architectures."""
    try:
        described = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads the weights says what is wrong with it
        described = {}
    values = described if isinstance(described, dict) else {}
    return {
        "model": config.model,
        "chat_template": "\n".join(template.templates.values()),
        "model_type": values.get("model_type"),
        "architectures": tuple(values.get("architectures") or ()),
    }
