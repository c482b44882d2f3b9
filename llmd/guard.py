"""What plugins build for the server: a wheel whose `build` raises loses that part, with one WARNING line, and no more."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmd.errors import ConfigError

if TYPE_CHECKING:
    from llmd.plugin.catalog import Catalog
    from llmd.plugin.specs import RouteSpec

log = logging.getLogger("llmd.plugin")


def guarded(catalog: Catalog, family: str, instead: Callable[[], Any] = lambda: None) -> list[Any]:
    """The specs of a family, their `build` made safe: where a wheel's raises, `instead()` stands in for what it builds."""
    return [
        replace(spec, build=_guard(catalog, family, name, spec.build, instead))
        for name, spec in catalog.registry(family).items()
    ]


def _guard(
    catalog: Catalog, family: str, name: str, build: Callable[..., Any], instead: Callable[[], Any]
) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        try:
            return build(*arguments)
        except Exception as error:  # noqa: BLE001 - _give_up raises it again unless it is a wheel's
            _give_up(catalog, family, name, error)
            return instead()

    return call


def _give_up(catalog: Catalog, family: str, name: str, error: Exception) -> None:
    """Raise again what is the user's to mend, or llmd's own mistake; of a wheel's, only tell."""
    owner = catalog.registry(family).owner(name)
    if isinstance(error, ConfigError) or owner.builtin:
        raise error
    if family == "authenticators":  # who cannot be asked for a key must not be let in
        raise ConfigError(
            f"plugin {owner}: authenticator {name!r} cannot be built: {type(error).__name__}: {error}"
        ) from error
    reason = f"{family}.{name} cannot be built and is left out: {type(error).__name__}: {error}"
    catalog.manager.note(owner.plugin, reason)
    log.warning("plugin %s: %s", owner, reason)
    log.debug("plugin %s", owner, exc_info=error)


def built_routes(catalog: Catalog, context: Any) -> list[RouteSpec]:
    """The routes whose handlers could be built, each built once."""
    specs = guarded(catalog, "routes")
    handlers = [(spec, spec.build(context)) for spec in specs]
    return [replace(spec, build=_give(handler)) for spec, handler in handlers if handler is not None]


def _give(handler: Any) -> Callable[..., Any]:
    return lambda context: handler


def no_service() -> Any:
    """A service that does nothing."""
    return contextlib.nullcontext()
