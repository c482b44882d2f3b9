"""The catalog: every registry of specs, the status rows of all plugins, and the hooks that are asked while serving."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from llmd.config import PluginsConfig
from llmd.errors import ConfigError
from llmd.plugin.manager import SPEC_TYPES, Found, Impl, PluginManager, PluginStatus
from llmd.plugin.registry import Offer, Registry
from llmd.plugin.specs import (
    AdapterFormatSpec,
    ArchitectureSpec,
    AttentionBackendSpec,
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
    RouteSpec,
    SamplerSpec,
    SchedulingPolicySpec,
    ServiceSpec,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registries:
    """One registry a register hook, in the order of hookspecs.py."""

    commands: Registry[CommandSpec]
    config_sections: Registry[ConfigSectionSpec]
    model_sources: Registry[ModelSourceSpec]
    checkpoint_formats: Registry[CheckpointFormatSpec]
    architectures: Registry[ArchitectureSpec]
    quantizations: Registry[QuantizationSpec]
    attention_backends: Registry[AttentionBackendSpec]
    adapter_formats: Registry[AdapterFormatSpec]
    kv_stores: Registry[KVStoreSpec]
    executors: Registry[ExecutorSpec]
    scheduling_policies: Registry[SchedulingPolicySpec]
    logits_processors: Registry[LogitsProcessorSpec]
    samplers: Registry[SamplerSpec]
    proposers: Registry[ProposerSpec]
    grammars: Registry[GrammarSpec]
    tool_parsers: Registry[ParserSpec]
    reasoning_parsers: Registry[ParserSpec]
    authenticators: Registry[AuthenticatorSpec]
    middlewares: Registry[MiddlewareSpec]
    routes: Registry[RouteSpec]
    metrics: Registry[MetricsSpec]
    services: Registry[ServiceSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog(Registries):
    """Registries by attribute (`catalog.samplers["torch"]`), what became of each plugin, and hook calls."""

    manager: PluginManager
    settings: dict[str, Any] = field(default_factory=dict)  # [plugins.<name>] tables, parsed into their models
    step_costs: dict[str, Any] = field(default_factory=dict)  # "family.name" → StepCost, of wheels that take part in steps
    _silenced: set[tuple[str, str]] = field(default_factory=set, repr=False)

    @property
    def plugins(self) -> list[PluginStatus]:
        """The status rows, in the order of loading."""
        return list(self.manager.statuses.values())

    @property
    def broken(self) -> list[PluginStatus]:
        """The plugins that were to load and did not."""
        return [row for row in self.plugins if row.state in ("failed", "incompatible")]

    def registry(self, family: str) -> Registry[Any]:
        """The registry of a family by its name."""
        registry: Registry[Any] = getattr(self, family)
        return registry

    def collect(self, hook: str, **arguments: Any) -> list[Any]:
        """Every answer that is not None, in the order of loading; who raises is left out."""
        answers = [self._call(impl, arguments) for impl in self.manager.impls(hook)]
        return [answer for answer in answers if answer is not None]

    def first(self, hook: str, **arguments: Any) -> Any:
        """The first answer that is not None, wheels asked before built-ins; who raises has no answer."""
        for impl in reversed(self.manager.impls(hook)):
            answer = self._call(impl, arguments)
            if answer is not None:
                return answer
        return None

    def notify(self, hook: str, **arguments: Any) -> None:
        """Tell every implementation; who raises keeps nobody from hearing it."""
        self.collect(hook, **arguments)

    def _call(self, impl: Impl, arguments: Mapping[str, Any]) -> Any:
        try:
            return impl.call(arguments)
        except Exception as error:  # one plugin's mistake must not become another's
            if (impl.plugin, impl.hook) not in self._silenced:
                self._silenced.add((impl.plugin, impl.hook))
                self.manager.note(impl.plugin, f"{impl.hook} raised {type(error).__name__}: {error}")
                log.warning(
                    "plugin %s: %s raised %s: %s (further ones are not logged)",
                    impl.plugin, impl.hook, type(error).__name__, error,
                )  # fmt: skip
            log.debug("plugin %s: %s", impl.plugin, impl.hook, exc_info=error)
            return None


def build_catalog(config: PluginsConfig, found: Iterable[Found] | None = None) -> Catalog:
    """Load the plugins and settle their names; raises ConfigError with every reason not to start."""
    manager = PluginManager(config)
    manager.load(found)
    registries: dict[str, Any] = {}
    problems: list[str] = []
    for family in (entry.name for entry in fields(Registries)):
        try:
            registries[family] = Registry(family, _offers(manager, family), config.prefer)
        except ConfigError as error:
            problems += error.problems
    _warn_unknown_preferences(config, manager)
    if problems:
        raise ConfigError(problems)
    return Catalog(manager=manager, **registries)


def _offers(manager: PluginManager, family: str) -> list[Offer[Any]]:
    return [
        Offer(spec, manager.statuses[plugin].owner)
        for plugin, families in manager.specs.items()
        for spec in families.get(family, ())
    ]


def _warn_unknown_preferences(config: PluginsConfig, manager: PluginManager) -> None:
    offered = {name for row in manager.statuses.values() for name in row.provides}
    for name in config.prefer:
        if name not in offered:
            families = ", ".join(SPEC_TYPES)
            log.warning("plugins.prefer: nothing is named %r; allowed: 'family.name', the family one of %s", name, families)
