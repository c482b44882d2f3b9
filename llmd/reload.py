"""Applying a changed configuration to a running daemon: everything that can refuse it first, then all at once.

read and check ─► prepare: build what the new keys need; a ConfigError here changes nothing
               ─► commit:  one function on the loop thread that only assigns, so no request sees half of it
               ─► idle:    the rest of what a drain is needed for, as soon as nothing runs
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from llmd.checks import check_files, check_names, parse_sections
from llmd.config import Config, ModelConfig, dotted
from llmd.config_diff import Change, Outcome, Rules, changes, merge
from llmd.config_load import sorted_problems
from llmd.errors import ConfigError, ModelError
from llmd.loading import in_thread
from llmd.log import set_level

if TYPE_CHECKING:
    from llmd.plugin.catalog import Catalog
    from llmd.plugin.specs import AuthenticatorSpec, MiddlewareSpec
    from llmd.server.app import ServerContext
    from llmd.server.auth import Authenticator, Principal
    from llmd.server.generate import ModelService

log = logging.getLogger(__name__)

Commit = Callable[[], None]  # assigns what was prepared; does not raise
_IDLE_POLL_S = 0.2


class Report(NamedTuple):
    """What a reload did, or would do."""

    changes: list[Change]
    problems: list[str]  # why nothing was changed; none: it was

    def as_dict(self) -> dict[str, Any]:
        """As the admin route answers."""
        rows = [{"key": dotted(c.path), "outcome": c.outcome.value, "old": c.old, "new": c.new} for c in self.changes]
        return {"refused": bool(self.problems), "problems": self.problems, "changes": rows}


class Reloader:
    """Reads the configuration again and carries what changed to everyone who goes by it. Loop thread only."""

    def __init__(
        self,
        catalog: Catalog,
        context: ServerContext,
        live: Sequence[LiveAuthenticators | LiveMiddlewares],
        read: Callable[[], Config] | None,
        build_queue: Callable[[Config], Any] | None = None,
    ) -> None:
        """`live` are rebuilt for each configuration; `build_queue` makes a waiting queue of the policy it names."""
        self._catalog, self._context, self._live, self._read = catalog, context, live, read
        self._build_queue = build_queue
        self._rules = Rules({name: spec.live for name, spec in catalog.config_sections.items()})
        self._lock = asyncio.Lock()
        self._waiting_for_idle: asyncio.Task[None] | None = None

    async def reload(self, is_dry: bool = False) -> Report:
        """Apply what may change while serving; with any mistake nothing changes. `is_dry`: only tell."""
        async with self._lock:
            if self._read is None:
                return Report([], ["there is no configuration file to reload"])
            running = self._context.config
            try:
                new, sections = await in_thread(self._read_checked)
            except (ConfigError, OSError, ValueError) as error:
                return self._refused([], error, is_dry)
            found = changes(running, new, self._rules)
            try:
                live = merge(running, new, Outcome.APPLIED, rules=self._rules)
                commits = await self._prepare(live, sections)
            except (ConfigError, ModelError, OSError, ValueError) as error:
                return self._refused([change._replace(outcome=Outcome.REFUSED) for change in found], error, is_dry)
            if not is_dry:
                self._commit(live, commits)
                await self._apply_adapters(live)
                self._apply_when_idle(merge(live, new, Outcome.DRAIN, rules=self._rules))
                _log(found)
            return Report(found, [])

    def _refused(self, found: list[Change], error: Exception, is_dry: bool) -> Report:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        for problem in problems if not is_dry else ():
            log.error("reload refused: %s", problem)
        return Report(found, problems)

    def _read_checked(self) -> tuple[Config, dict[str, Any]]:
        """The configuration as it would be read at a start, and the plugins' sections of it; blocks."""
        assert self._read is not None
        config = self._read()
        problems: list[str] = []
        sections = parse_sections(config, self._catalog, problems)
        problems += check_names(config, self._catalog) + check_files(config, self._catalog)
        if problems:
            raise ConfigError(sorted_problems(problems))
        return config, dict(sections)

    # --- prepare

    async def _prepare(self, live: Config, sections: Mapping[str, Any]) -> list[Commit]:
        """What is to be called to apply the configuration; raises where it cannot be."""
        services = self._context.models()
        pairs = [(service, _model_of(service, live)) for service in services]
        defaults = [await in_thread(partial(service.read_defaults, model)) for service, model in pairs]
        commits = [part.prepare(live) for part in self._live]
        for (service, model), values in zip(pairs, defaults, strict=True):
            commits.append(partial(service.reconfigure, live, model, values))
        commits.append(partial(self._take_sections, sections))
        return commits

    def _take_sections(self, sections: Mapping[str, Any]) -> None:
        """The live fields of every plugin's settings; the others stay as they were at the start."""
        current = self._context.sections
        for name, spec in self._catalog.config_sections.items():
            if spec.live and name in sections and name in current:
                fields = {field: getattr(sections[name], field) for field in spec.live}
                current[name] = self._catalog.settings[name] = current[name].model_copy(update=fields)

    # --- commit

    def _commit(self, live: Config, commits: Sequence[Commit]) -> None:
        """All at once: nothing else runs on the loop meanwhile."""
        self._context.config = live
        self._context.quotas.configure(live.keys)
        shares = self._context.quotas.shares()
        for commit in commits:
            commit()
        for service in self._context.models():
            service.engine.set_shares(shares)
        set_level(live.log.level)
        self._catalog.notify("llmd_reloaded", config=live, sections=self._context.sections)

    async def _apply_adapters(self, live: Config) -> None:
        """New adapters are read while requests run; their files have been checked, so what fails now is only told."""
        for service in self._context.models():
            await service.adapters.apply(live.adapters)

    def bind(self, service: ModelService) -> None:
        """A model that has been built goes by the keys as they are now."""
        service.quotas = self._context.quotas
        service.engine.set_shares(self._context.quotas.shares())

    # --- what waits until nothing runs

    def _apply_when_idle(self, config: Config) -> None:
        if self._waiting_for_idle is not None:
            self._waiting_for_idle.cancel()
            self._waiting_for_idle = None
        if config.scheduler != self._context.config.scheduler and self._build_queue is not None:
            self._waiting_for_idle = asyncio.ensure_future(self._when_idle(config))

    async def _when_idle(self, config: Config) -> None:
        assert self._build_queue is not None
        services = self._context.models()
        while any(not service.engine.is_idle for service in services):
            await asyncio.sleep(_IDLE_POLL_S)
        for service in services:
            service.engine.replace_queue(config.scheduler, self._build_queue(config))
            service.engine.set_shares(self._context.quotas.shares())
        self._context.config = self._context.config.model_copy(update={"scheduler": config.scheduler})
        log.info("reload: nothing runs, [scheduler] is applied")


def _model_of(service: ModelService, config: Config) -> ModelConfig:
    """The `[[models]]` table of a service: its names do not change while it serves."""
    tables = (model for model in config.models if (model.served_model_name or (model.model,)) == service.names)
    return next(tables, service.config)


def _log(found: Sequence[Change]) -> None:
    for change in found:
        level = logging.INFO if change.outcome is Outcome.APPLIED else logging.WARNING
        log.log(level, "reload: %s", change.text)
    log.info("reloaded: %d keys changed", len(found))


class LiveAuthenticators:
    """All authenticators as one whose keys can be exchanged while requests run. Fails closed: who raises lets nobody in."""

    def __init__(self, specs: list[AuthenticatorSpec], config: Config) -> None:
        self._specs = sorted(specs, key=lambda spec: spec.order)
        self._built: list[Authenticator] = []
        self.prepare(config)()

    def prepare(self, config: Config) -> Commit:
        """Build every authenticator for this configuration; the old ones stay until the answer is called.

        Raises ConfigError when nothing would be asked for any more: a door that was shut opens only with a restart.
        """
        built = [authenticator for spec in self._specs if (authenticator := spec.build(config)) is not None]
        if self._built and not built:
            raise ConfigError("server.api_keys: the last key cannot be taken away while serving, that needs a restart")

        def commit() -> None:
            self._built = built

        return commit

    async def authenticate(self, headers: Mapping[str, str], peer: str | None) -> Principal | None:
        """The first principal found; with nothing to check everyone is anonymous."""
        from llmd.server.auth import ANONYMOUS

        for authenticator in self._built:
            if (principal := await authenticator.authenticate(headers, peer)) is not None:
                return principal
        return None if self._built else ANONYMOUS


class LiveMiddlewares:
    """Middlewares that are built anew for each configuration; those that a configuration does not want let requests pass."""

    def __init__(self, specs: list[MiddlewareSpec], config: Config) -> None:
        self._specs = specs
        self._built: dict[str, Any] = {}
        self.prepare(config)()

    def prepare(self, config: Config) -> Commit:
        """Build every middleware for this configuration; the old ones stay until the answer is called."""
        built = {spec.name: spec.build(config) for spec in self._specs}

        def commit() -> None:
            self._built = built

        return commit

    def specs(self) -> list[MiddlewareSpec]:
        """What the server wraps its requests in, once and for all."""
        return [replace(spec, build=lambda config, name=spec.name: self._middleware(name)) for spec in self._specs]

    def _middleware(self, name: str) -> Any:
        from aiohttp import web

        @web.middleware
        async def live(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
            inner = self._built[name]
            return await (handler(request) if inner is None else inner(request, handler))

        return live
