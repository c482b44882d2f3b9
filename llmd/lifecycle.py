"""The life of the daemon in the order it happens: listen, load, serve, reload, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from llmd.config import Config, ModelConfig
from llmd.crash import Deadline
from llmd.engine.executor import LoadProgress
from llmd.errors import EngineFailure, ExitCode
from llmd.guard import built_routes, guarded, no_service
from llmd.listeners import Inherited
from llmd.loading import Bar, in_thread, seconds_since_start, warm_up
from llmd.plugin.catalog import Catalog
from llmd.plugin.specs import AuthenticatorSpec
from llmd.plugin_guards import CostCollector, status_rows
from llmd.reload import LiveAuthenticators, LiveMiddlewares, Reloader
from llmd.sdnotify import Notifier
from llmd.status import StatusLine

if TYPE_CHECKING:
    from llmd.server.app import ServerContext
    from llmd.server.generate import ModelService
    from llmd.sites import Sites

log = logging.getLogger("llmd.daemon")

_RESOLVE_SHARE = 0.3  # of a model's bar, where its files must be downloaded first
_LOAD_STEP_S = 120.0  # systemd's patience from one sign of progress to the next while loading
_POLL_S = 0.25  # how soon a failed engine is noticed
_LAST_WORDS_S = 0.5  # time for final errors to reach clients before the process ends
_GIVE_UP_S = 10.0  # for an executor that does not stop: the process ends all the same
_LAST_REQUESTS_S = 1.0  # for clients that are connected when a drain begins to say what they want
_SWEEP_S = 0.05  # between two looks at connections that have become idle


class Daemon:
    """One process that serves; `run` is its whole life."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        *,
        resolve: Callable[..., FilePath],
        build: Callable[..., ModelService],
        reload: Callable[[], Config] | None = None,
        inherited: Inherited | None = None,
    ) -> None:
        """`resolve` and `build` are those of the composition root: a model's folder, and its service.

        `inherited` are the sockets of a supervisor, which then take the place of those of the configuration.
        """
        self._resolve, self._build = resolve, build
        self._config = config
        self._catalog = catalog
        self._inherited = inherited or Inherited()
        self._sites: Sites
        self._notifier = Notifier()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()  # the second signal: do not wait for running requests
        self._services: list[ModelService] = []
        self._reloading: asyncio.Task[None] | None = None
        self._wants_reload = False
        self._extended_s = 0.0  # when systemd was last asked for more time to load
        self._was_ready = False
        self._status = StatusLine(self._services)
        self._dumping: asyncio.Task[None] | None = None
        self.deadline = Deadline()  # set once the daemon has failed; cancelled by whoever has taken the exit code
        self._authenticators = LiveAuthenticators(guarded(catalog, "authenticators"), config)
        self._middlewares = LiveMiddlewares(guarded(catalog, "middlewares"), config)
        self._context = self._make_context()
        live = (self._authenticators, self._middlewares)
        self._reloader = Reloader(catalog, self._context, live, reload, self._build_queue)

    async def run(self) -> ExitCode:
        """Listen, load, serve until told to stop or the device is gone; the exit code says which."""
        self._catch_signals()
        await self._listen()
        try:
            code = await self._load_and_serve()
            if code is not ExitCode.CLEAN:
                self.deadline.set(code, _GIVE_UP_S)
            await self._drain(code)
        except Exception as error:
            self._notifier.failed(f"failed: {error}")
            raise
        finally:
            await self._sites.close()
            self._notifier.close()
        log.info("llmd ends: %s", code.name.lower().replace("_", " "))
        return code

    # --- signals

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may; who embeds the daemon elsewhere stops it otherwise
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, signal.Signals(number).name)
        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
        if hasattr(signal, "SIGQUIT"):
            loop.add_signal_handler(signal.SIGQUIT, self._dump_soon)

    def _dump_soon(self) -> None:
        """SIGQUIT: write what every engine did last, and go on."""
        if self._dumping is None or self._dumping.done():
            self._dumping = asyncio.ensure_future(self._dump())

    async def _dump(self) -> None:
        for service in self._services:
            if await service.engine.dump("SIGQUIT") is None:
                log.warning("SIGQUIT: no flight record of %s is written: health.state_dir is not set", service.names[0])

    def stop(self, why: str = "asked to stop") -> None:
        """Begin to drain; asked again, abort what still runs."""
        if self._stopping.is_set():
            log.warning("%s again: running requests are aborted", why)
            self._hurry.set()
        else:
            log.info("%s: draining", why)
            self._context.takes_last_requests = self._context.state == "ready"
            self._context.state = "draining"  # not ready at once
            self._stopping.set()

    # --- listen

    def _make_context(self) -> ServerContext:
        from llmd.server.app import ServerContext

        catalog = self._catalog
        live = AuthenticatorSpec(name="all", summary="every authenticator", build=lambda config: self._authenticators)
        context = ServerContext(
            config=self._config,
            authenticators=[live] if catalog.authenticators else [],
            middlewares=self._middlewares.specs(),
            metric_specs=guarded(catalog, "metrics"),
            service_specs=guarded(catalog, "services", no_service),
            sections=dict(catalog.settings),
            request_finished=lambda summary: catalog.notify("llmd_request_finished", summary=summary),
            plugin_status=lambda: status_rows(catalog),
            drain=self.stop,
            reload=self.reload,
        )
        context.metrics.registry.register(CostCollector(catalog.step_costs))
        return context

    async def _listen(self) -> None:
        """Open the listeners; /ready tells from the first moment how far loading is."""
        from llmd.sites import Sites

        self._context.routes = built_routes(self._catalog, self._context)
        self._sites = Sites(self._config, self._context, self._inherited, last_words_s=_LAST_WORDS_S)
        try:
            await self._sites.open()
        except BaseException:
            await self._sites.close()
            raise

    # --- load and serve

    async def _load_and_serve(self) -> ExitCode:
        if not await self._until_stopping(self._load()):
            return ExitCode.CLEAN
        if (code := self._failure()) is None and not self._stopping.is_set():
            self._context.state = "ready"
            self._was_ready = True
            await self._sites.accept()
            self._log_ready()
            gc.freeze()  # all that was loaded stays: a full collection that walked it would stop every stream for 0.1 s
            await self._until_stopping(self._watch())
            code = self._failure()
        return ExitCode.CLEAN if code is None else code

    async def _until_stopping(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do work unless a signal comes first; whether it was finished."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            task.cancel()
            await asyncio.wait((task,))
            return False
        finally:
            stopping.cancel()

    async def _load(self) -> None:
        telling = asyncio.ensure_future(self._tell_loading())
        try:
            for index, model in enumerate(self._config.models):
                with contextlib.closing(Bar(model.model)) as bar:
                    await self._load_model(index, model, bar)
        finally:
            telling.cancel()

    async def _tell_loading(self) -> None:
        """Again and again, for what comes too soon behind another line is not sent."""
        while True:
            self._notifier.status(f"loading: {self._context.progress.phase}")
            await asyncio.sleep(_POLL_S)

    async def _load_model(self, index: int, model: ModelConfig, bar: Bar) -> None:
        loop = asyncio.get_running_loop()
        downloaded = False

        def show(progress: LoadProgress) -> None:
            bar.show(progress)
            self._tell_progress(index, progress)

        def fetched(progress: LoadProgress) -> None:
            nonlocal downloaded
            downloaded = True
            show(LoadProgress(progress.phase, progress.fraction * _RESOLVE_SHARE))

        def started(progress: LoadProgress) -> None:
            done = _RESOLVE_SHARE if downloaded else 0.0
            show(LoadProgress(progress.phase, done + progress.fraction * (1 - done)))

        def report(progress: LoadProgress) -> None:
            loop.call_soon_threadsafe(fetched, progress)

        path: FilePath = await in_thread(lambda: self._resolve(self._config, self._catalog, model, report))
        service = await in_thread(lambda: self._build(self._config, self._catalog, model, path=path))
        self._reloader.bind(service)
        self._services.append(service)
        self._context.services.update(dict.fromkeys(service.names, service))
        await service.start(started)
        self._tell_progress(index, LoadProgress("warm-up", 1.0))
        await warm_up(service)

    def _tell_progress(self, index: int, progress: LoadProgress) -> None:
        num_models = len(self._config.models)
        phase = progress.phase if num_models == 1 else f"model {index + 1}/{num_models}: {progress.phase}"
        self._context.progress = LoadProgress(phase, (index + progress.fraction) / num_models)
        self._notifier.status(f"loading: {phase}")
        if time.monotonic() - self._extended_s > 1.0:
            self._extended_s = time.monotonic()
            self._notifier.extend_timeout(_LOAD_STEP_S)

    def _log_ready(self) -> None:
        for service in self._services:
            info = service.engine.info
            log.info(
                "%s: %s, attention %s, %d KV blocks of %d tokens (%d tokens), weights %.1f MB, KV %.1f MB, context %d",
                ", ".join(service.names), info.device, info.attention_backend, info.num_blocks, info.block_size,
                info.num_blocks * info.block_size, info.weights_bytes / 1e6, info.kv_bytes / 1e6, service.max_model_len,
            )  # fmt: skip
        log.info("ready after %.1f s", seconds_since_start())
        self._notifier.ready(self._status.text())

    async def _watch(self) -> None:
        """Return when an engine has failed; meanwhile tell systemd that steps are made."""
        watchdog_s = self._notifier.watchdog_s
        told_s, num_signs = time.monotonic(), self._num_signs()
        while self._failure() is None:
            await asyncio.sleep(_POLL_S)
            self._notifier.status(self._status.text())
            if watchdog_s is not None and time.monotonic() - told_s >= watchdog_s / 3:
                now = self._num_signs()
                if all(new != old for new, old in zip(now, num_signs, strict=True)):
                    told_s, num_signs = time.monotonic(), now
                    self._notifier.watchdog()

    def _num_signs(self) -> list[int]:
        """Of life, of each engine: systemd hears of life only on proof that each of them lives."""
        return [service.engine.pulse.num_signs for service in self._services]

    def _failure(self) -> ExitCode | None:
        """Why serving cannot go on, as an exit code; None while every engine is well."""
        for service in self._services:
            if (failure := service.engine.failure) is not None:
                self._context.state = "failed"
                log.error("%s: the engine failed: %s", service.names[0], failure)
                return ExitCode.DEVICE_GONE if isinstance(failure, EngineFailure) else ExitCode.INTERNAL
        return None

    # --- reload

    def _reload_soon(self) -> None:
        """Reload after this signal: one that comes while a reload runs may speak of a newer file, so another follows."""
        self._wants_reload = True
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.ensure_future(self._reload_until_done())

    async def _reload_until_done(self) -> None:
        while self._wants_reload and not self._stopping.is_set():
            self._wants_reload = False
            await self.reload()

    @contextlib.asynccontextmanager
    async def _telling_of_reload(self) -> AsyncIterator[None]:
        """systemd waits for the end of a reload; before start-up is over READY=1 would mean something else."""
        if not self._was_ready:
            yield
            return
        self._notifier.reloading()
        try:
            yield
        finally:
            if not self._stopping.is_set():
                self._notifier.ready(self._status.text())

    async def reload(self, is_dry: bool = False) -> dict[str, Any]:
        """Apply what may change while serving, or only tell what would happen; a file with any mistake changes nothing."""
        if is_dry:
            return (await self._reloader.reload(is_dry)).as_dict()
        async with self._telling_of_reload():
            report = await self._reloader.reload()
            self._config = self._context.config
        return report.as_dict()

    def _build_queue(self, config: Config) -> Any:
        return self._catalog.scheduling_policies[config.scheduler.policy].build(config.scheduler)

    # --- drain

    async def _drain(self, code: ExitCode) -> None:
        """Hand the listener back, let what runs end, abort the rest, let its clients hear of it."""
        is_graceful = code is ExitCode.CLEAN and self._was_ready
        timeout_s = self._config.server.drain_timeout_s if is_graceful else 0.0
        if code is ExitCode.CLEAN:
            self._context.state = "draining"
        self._notifier.stopping(f"draining, at most {timeout_s:g} s")
        self._notifier.extend_timeout(timeout_s + _LAST_REQUESTS_S + 2 * _GIVE_UP_S)
        deadline_s = time.monotonic() + timeout_s
        await self._sites.stop_accepting()
        sweeping = asyncio.ensure_future(self._sweep())
        try:
            if is_graceful:
                await self._last_requests(min(deadline_s, time.monotonic() + _LAST_REQUESTS_S))
            self._context.takes_last_requests = False
            await self._end_services(max(0.0, deadline_s - time.monotonic()))
            await self._last_words(max(deadline_s, time.monotonic() + _LAST_WORDS_S))
        finally:
            sweeping.cancel()

    async def _sweep(self) -> None:
        """Hang up on clients that have their answer and ask nothing more."""
        while True:
            self._sites.close_idle()
            self._notifier.status(f"draining: {self._status.text()}")
            await asyncio.sleep(_SWEEP_S)

    async def _last_requests(self, deadline_s: float) -> None:
        """Clients that were let in and have not asked yet are not sent away: none must be lost by a restart."""
        while self._sites.num_silent() and not self._hurry.is_set() and time.monotonic() < deadline_s:
            await asyncio.sleep(_SWEEP_S)

    async def _end_services(self, timeout_s: float) -> None:
        """Stop every model within the time, or at once if asked twice."""
        patience_s = _GIVE_UP_S if self._was_ready else _LAST_WORDS_S  # a load that is cut short is not waited for
        draining = asyncio.ensure_future(self._stop_services(timeout_s))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((draining, hurry), timeout=timeout_s + patience_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not draining.done():
            draining.cancel()
            aborting = asyncio.ensure_future(self._stop_services(0.0))
            if not (await asyncio.wait((aborting,), timeout=patience_s))[0] and self._was_ready:
                log.error("the executor does not stop")

    async def _last_words(self, deadline_s: float) -> None:
        """What was generated, or why it was not, is still on its way to slow clients."""
        while self._sites.num_busy() and not self._hurry.is_set() and time.monotonic() < deadline_s:
            await asyncio.sleep(_SWEEP_S)

    async def _stop_services(self, drain_s: float) -> None:
        """Stop every model; one that cannot must not keep the others from it."""
        stopping = (service.stop(drain_s=drain_s) for service in self._services)
        for answer in await asyncio.gather(*stopping, return_exceptions=True):
            if isinstance(answer, Exception):
                log.error("a model did not stop as it should: %s", answer)
