"""The composition root: plugins → catalog → models → serve → reload → drain. It alone knows every layer."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from llmd.checks import check_names, find_source, parse_sections
from llmd.config import AdaptersConfig, Config, ModelConfig
from llmd.config_load import load_config, sorted_problems
from llmd.crash import tell_of_crashes
from llmd.engine.executor import LoadProgress
from llmd.errors import ConfigError, ExitCode
from llmd.listeners import inherit
from llmd.plugin.catalog import Catalog, build_catalog
from llmd.plugin_guards import StepGuards

if TYPE_CHECKING:
    from llmd.model.parts import ModelParts
    from llmd.server.adapters import AdapterSources
    from llmd.server.generate import ModelService
    from llmd.server.parsers import ParserParts

log = logging.getLogger(__name__)

Report = Callable[[LoadProgress], None]


def load_catalog(config: Config) -> Catalog:
    """Load the plugins and check the configuration against them; raises ConfigError with all that is wrong."""
    catalog = build_catalog(config.plugins)
    problems: list[str] = []
    sections = parse_sections(config, catalog, problems)
    problems += check_names(config, catalog)
    if problems:
        raise ConfigError(sorted_problems(problems))
    catalog.settings.update(sections)
    return catalog


def model_parts(catalog: Catalog, adapters: AdaptersConfig | None = None) -> ModelParts:
    """What the model layer needs of the catalog; it may not know the catalog itself."""
    from llmd.model.parts import ModelParts

    guards = StepGuards(catalog)
    return ModelParts(
        architectures={name: spec for spec in catalog.architectures.values() for name in spec.architectures},
        quantizations=catalog.quantizations,
        attention_backends=guards.guarded("attention_backends"),
        checkpoint_formats=catalog.checkpoint_formats,
        logits_processors=guards.guarded("logits_processors"),
        samplers=guards.guarded("samplers"),
        adapter_formats=catalog.adapter_formats,
        adapters=adapters,
        select_attention_backend=lambda needs, usable: catalog.first(
            "llmd_select_attention_backend", needs=needs, usable=usable
        ),
    )


def parser_parts(catalog: Catalog) -> ParserParts:
    """What the server needs of the catalog to read what models write."""
    from llmd.server.parsers import ParserParts

    return ParserParts(
        catalog.tool_parsers,
        catalog.reasoning_parsers,
        lambda facts: catalog.first("llmd_select_parsers", model=facts),
    )


def _ignore(progress: LoadProgress) -> None:
    """Progress that nobody looks at."""


def resolve_model(config: Config, catalog: Catalog, model_config: ModelConfig, report: Report = _ignore) -> FilePath:
    """The folder of a model's files, downloaded where need be; blocks. Raises ModelError or ConfigError."""
    source = find_source(catalog, model_config)
    if source is None:
        known = ", ".join(catalog.model_sources)
        raise ConfigError(f"models.model: {model_config.model!r} is claimed by no model source; known: {known}")
    return source.resolve(model_config, report)


def build_service(
    config: Config,
    catalog: Catalog,
    model_config: ModelConfig,
    *,
    path: FilePath | None = None,
    report: Report = _ignore,
) -> ModelService:
    """One model's service, not yet started; blocks while files are fetched and modules are imported."""
    from llmd.model import kernels_ahead
    from llmd.server.generate import ModelService

    path = path or resolve_model(config, catalog, model_config, report)
    tokenizer_path = None
    if model_config.tokenizer:
        of_tokenizer = {"model": model_config.tokenizer, "revision": None, "load_format": "dummy"}
        tokenizer_path = resolve_model(config, catalog, model_config.model_copy(update=of_tokenizer), report)
    adapters = config.adapters if model_config == config.models[0] else None  # they change the default model
    parts = model_parts(catalog, adapters)
    kernels_ahead.begin(config, model_config, path, parts)
    executor = catalog.executors[model_config.executor].build(
        model_config, path=path, cache=config.cache_of(model_config), scheduler=config.scheduler, parts=parts
    )
    waiting = catalog.scheduling_policies[config.scheduler.policy].build(config.scheduler)
    return ModelService.create(
        config,
        model_config,
        path,
        executor,
        waiting,
        tokenizer_path=tokenizer_path,
        grammars=catalog.grammars,
        parsers=parser_parts(catalog),
        adapters=adapter_sources(catalog, model_config),
    )


def adapter_sources(catalog: Catalog, model_config: ModelConfig) -> AdapterSources:
    """Where a model's adapters may come from, besides the configuration."""
    from llmd.server.adapters import AdapterSources

    source = find_source(catalog, model_config)
    own = source.adapters(model_config) if source is not None and source.adapters is not None else {}
    return AdapterSources(own, lambda name, config: catalog.first("llmd_resolve_adapter", name=name, config=config))


def serve(
    config: Config | None = None,
    *,
    config_file: str | None = None,
    reload: Callable[[], Config] | None = None,
    **flags: Any,
) -> ExitCode:
    """Serve until a signal says stop; the exit code tells why it ended. Raises ConfigError before anything listens.

    Without `config`, it is read from `config_file` and from keywords named like the flags of `llmd serve`:
    `serve(model="demo", port=8000)`.
    """
    from llmd import log as logs

    if config is None:
        from llmd.flags import settings_of

        settings = settings_of(flags)
        reload = reload or (lambda: load_config(config_file, settings=settings))
        config = load_config(config_file, settings=settings)
    logs.setup(config.log)
    tell_of_crashes()
    inherited = inherit()  # before anything starts a child that could keep them open
    catalog = load_catalog(config)
    _warm_up(config, catalog)
    from llmd.lifecycle import Daemon

    daemon = Daemon(config, catalog, resolve=resolve_model, build=build_service, reload=reload, inherited=inherited)
    try:
        return _run(daemon.run)
    finally:
        daemon.deadline.cancel()


def _warm_up(config: Config, catalog: Catalog) -> None:
    """Begin the imports that take longest while the HTTP server comes up."""
    specs = {name: catalog.executors[name] for name in dict.fromkeys(model.executor for model in config.models)}

    def work() -> None:
        for name, spec in specs.items():
            try:
                if spec.warm_up is not None:
                    spec.warm_up()
            except Exception as error:  # noqa: BLE001 - building the executor raises it again, where it is told
                log.debug("executor %s cannot warm up: %s", name, error)

    threading.Thread(target=work, name="llmd-warm-up", daemon=True).start()


def _run(main: Callable[[], Any]) -> ExitCode:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.run(main())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())
