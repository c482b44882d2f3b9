"""The adapters of one served model by their names: those it has from the start, and those found when first asked for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from llmd.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from llmd.config import AdaptersConfig
    from llmd.engine.adapter_slots import AdapterInfo
    from llmd.engine.engine import Engine

log = logging.getLogger(__name__)

_MISS_S = 2.0  # so long nobody looks again for a name that was not found
_MAX_MISSES = 1024
_MAX_LOOKED_FOR = 256  # characters of a name


class AdapterSources(NamedTuple):
    """Where a model's adapters come from, beside the configuration's list."""

    own: Mapping[str, str] = {}  # name → folder: those that came with the model
    resolve: Callable[[str, AdaptersConfig], str | None] | None = None  # the folder of one that is not known yet


class ServedAdapters:
    """The names under which requests reach the adapters of one model. Loop thread only."""

    def __init__(self, engine: Engine, config: AdaptersConfig, sources: AdapterSources) -> None:
        self._engine, self.config, self._sources = engine, config, sources
        self._is_started = False
        self._misses: OrderedDict[str, float] = OrderedDict()  # name → when it may be looked for again
        self._draining: set[asyncio.Task[None]] = set()

    @property
    def is_enabled(self) -> bool:
        """Whether the model serves adapters; not before it is loaded."""
        return self._is_started and self._engine.adapter_store.is_enabled

    async def start(self) -> None:
        """Take over the configured ones, as many as host memory holds; the others are read when they are asked for.

        Raises ConfigError for one that cannot be served.
        """
        self._is_started = True
        if not self.is_enabled:
            return
        store, modules = self._engine.adapter_store, self.config.modules()
        for name, path in self._sources.own.items():
            if name not in modules:
                store.declare(name, path)
        for index, (name, path) in enumerate(modules.items()):
            try:
                await store.load(name, path) if index < self.config.host_slots else store.declare(name, path)
            except AdapterError as error:
                raise ConfigError(f"adapters.lora_modules: {name!r} cannot be served: {error}") from error

    # --- names

    def list(self) -> list[AdapterInfo]:
        """What is known of each adapter that requests may ask for; an old generation that drains is not among them."""
        if not self.is_enabled:
            return []
        store = self._engine.adapter_store
        return [info for info in store.list() if info.state != "draining"]

    def has(self, name: str) -> bool:
        """Whether it is known; nobody is asked for it."""
        return self.is_enabled and self._engine.adapter_store.has(name)

    def find(self, name: str) -> bool:
        """Whether requests may ask for it; a name that is not known is looked for where adapters may come from."""
        if not self.is_enabled:
            return False
        return self._engine.adapter_store.has(name) or self._resolve(name)

    def _resolve(self, name: str) -> bool:
        resolve = self._sources.resolve
        if resolve is None or not 0 < len(name) <= _MAX_LOOKED_FOR or self._misses.get(name, 0.0) > time.monotonic():
            return False
        path = resolve(name, self.config)
        if path is None:
            self._misses[name] = time.monotonic() + _MISS_S
            self._misses.move_to_end(name)
            if len(self._misses) > _MAX_MISSES:
                self._misses.popitem(last=False)
            return False
        self._misses.pop(name, None)
        try:
            self._engine.adapter_store.declare(name, path)
        except AdapterError as error:  # somebody is loading it just now
            log.debug("adapter %s was found and cannot be used: %s", name, error)
            return False
        return True

    # --- changes

    async def load(self, name: str, path: str, *, replace: bool = False) -> AdapterInfo:
        """Read an adapter now; requests may ask for it when this returns. Raises AdapterError and changes nothing."""
        self._misses.pop(name, None)
        return await self._engine.adapter_store.load(name, path, replace=replace)

    async def unload(self, name: str) -> None:
        """Take no more requests for it, and return when those under way have ended. Raises AdapterNotFound."""
        await self._engine.adapter_store.unload(name)

    async def ensure(self, name: str, path: str) -> None:
        """Load it unless it is there from this folder. Raises AdapterError where the name has another one."""
        known = next((info for info in self.list() if info.name == name), None)
        if known is None:
            await self.load(name, path)
        elif known.path != path:
            raise AdapterError(f"adapter {name!r} is there from another folder", param="lora_request")

    async def apply(self, config: AdaptersConfig) -> None:
        """Go by a changed list: new ones are loaded, changed ones replaced, those no longer named unloaded.

        One that cannot be used is logged and stays as it was. Returns before what was unloaded has drained.
        """
        before, now = self.config.modules(), config.modules()
        self.config = config
        self._misses.clear()
        if not self.is_enabled:
            return
        store = self._engine.adapter_store
        for name in before.keys() - now.keys():
            if store.has(name):
                self._drain(name)
        for name, path in now.items():
            if before.get(name) == path and store.has(name):
                continue
            try:
                await store.load(name, path, replace=True)
            except AdapterError as error:
                log.error("reload: adapter %s stays as it was: %s", name, error)

    def _drain(self, name: str) -> None:
        task = asyncio.ensure_future(self._engine.adapter_store.unload(name))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)
