"""The life of the daemon in the order it happens: listen, load, serve, reload, drain, end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from llmd._version import __version__
from llmd.checks import check_files, check_names, parse_sections
from llmd.config import Config, ModelConfig
from llmd.engine.executor import LoadProgress
from llmd.errors import CannotListen, ConfigError, EngineFailure, ExitCode, LlmdError
from llmd.guard import built_routes, guarded, no_service
from llmd.loading import Bar, in_thread, seconds_since_start
from llmd.log import set_level
from llmd.plugin.catalog import Catalog
from llmd.plugin.specs import AuthenticatorSpec
from llmd.reload import LiveAuthenticators, changes, merge_live
from llmd.sdnotify import Notifier

if TYPE_CHECKING:
    from aiohttp import web

    from llmd.server.app import ServerContext
    from llmd.server.generate import ModelService

log = logging.getLogger("llmd.daemon")

_RESOLVE_SHARE = 0.3  # of a model's bar, where its files must be downloaded first
_LOAD_STEP_S = 120.0  # systemd's patience from one sign of progress to the next while loading
_POLL_S = 0.25  # how soon a failed engine is noticed
_LAST_WORDS_S = 0.5  # time for final errors to reach clients before the process ends
_GIVE_UP_S = 10.0  # for an executor that does not stop: the process ends all the same


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
    ) -> None:
        """`resolve` and `build` are those of the composition root: a model's folder, and its service."""
        self._resolve, self._build = resolve, build
        self._config = config
        self._catalog = catalog
        self._read_config = reload
        self._notifier = Notifier()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()  # the second signal: do not wait for running requests
        self._services: list[ModelService] = []
        self._reloading: asyncio.Task[None] | None = None
        self._extended_s = 0.0  # when systemd was last asked for more time to load
        self._was_ready = False
        self._authenticators = LiveAuthenticators(guarded(catalog, "authenticators"), config)
        self._context = self._make_context()

    async def run(self) -> ExitCode:
        """Listen, load, serve until told to stop or the device is gone; the exit code says which."""
        self._catch_signals()
        runner = await self._listen()
        try:
            code = await self._load_and_serve()
            await self._drain(code)
        except Exception as error:
            self._notifier.status(f"failed: {error}")
            raise
        finally:
            await runner.cleanup()
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

    def stop(self, why: str = "asked to stop") -> None:
        """Begin to drain; asked again, abort what still runs."""
        if self._stopping.is_set():
            log.warning("%s again: running requests are aborted", why)
            self._hurry.set()
        else:
            log.info("%s: draining", why)
            self._context.state = "draining"  # not ready at once
            self._stopping.set()

    # --- listen

    def _make_context(self) -> ServerContext:
        from llmd.server.app import ServerContext

        catalog = self._catalog
        live = AuthenticatorSpec(name="all", summary="every authenticator", build=lambda config: self._authenticators)
        return ServerContext(
            config=self._config,
            authenticators=[live] if catalog.authenticators else [],
            middlewares=guarded(catalog, "middlewares"),
            metric_specs=guarded(catalog, "metrics"),
            service_specs=guarded(catalog, "services", no_service),
            sections=dict(catalog.settings),
            request_finished=lambda summary: catalog.notify("llmd_request_finished", summary=summary),
            plugin_status=lambda: [asdict(row) for row in catalog.plugins],
        )

    async def _listen(self) -> web.AppRunner:
        """Open the HTTP listener; /ready tells from the first moment how far loading is."""
        from llmd.server.app import create_app, make_runner

        self._context.routes = built_routes(self._catalog, self._context)
        runner = make_runner(create_app(self._context), shutdown_timeout=_LAST_WORDS_S)
        await runner.setup()
        try:
            await self._open_site(runner)
        except OSError as error:
            await runner.cleanup()
            raise _cannot_listen(self._config, error) from None
        return runner

    async def _open_site(self, runner: web.AppRunner) -> None:
        from aiohttp import web

        server = self._config.server
        site: web.BaseSite
        if server.uds:
            site = web.UnixSite(runner, server.uds)
        else:
            site = web.TCPSite(runner, server.host, server.port, ssl_context=_ssl_context(self._config))
        await site.start()
        log.info("llmd %s listens on %s", __version__, self._url(runner))

    def _url(self, runner: web.AppRunner) -> str:
        server = self._config.server
        if server.uds:
            return f"unix:{server.uds}"
        port = next((address[1] for address in runner.addresses), server.port)
        host = f"[{server.host}]" if ":" in server.host else server.host
        return f"{'https' if server.ssl_certfile else 'http'}://{host}:{port}{server.root_path}"

    # --- load and serve

    async def _load_and_serve(self) -> ExitCode:
        if not await self._until_stopping(self._load()):
            return ExitCode.CLEAN
        if (code := self._failure()) is None and not self._stopping.is_set():
            self._context.state = "ready"
            self._was_ready = True
            self._log_ready()
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
        for index, model in enumerate(self._config.models):
            bar = Bar(model.model)
            try:
                await self._load_model(index, model, bar)
            finally:
                bar.close()

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
        self._services.append(service)
        self._context.services.update(dict.fromkeys(service.names, service))
        await service.start(started)

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
        self._notifier.ready(self._status())

    def _status(self) -> str:
        stats = [service.engine.stats() for service in self._services]
        return f"{sum(s.num_running for s in stats)} running, {sum(s.num_waiting for s in stats)} waiting"

    async def _watch(self) -> None:
        """Return when an engine has failed; meanwhile tell systemd that steps are made."""
        watchdog_s = self._notifier.watchdog_s
        told_s, num_steps = time.monotonic(), self._num_steps()
        while self._failure() is None:
            await asyncio.sleep(_POLL_S)
            self._notifier.status(self._status())
            if watchdog_s is not None and time.monotonic() - told_s >= watchdog_s / 3:
                told_s = time.monotonic()
                num_steps = await self._prove_progress(num_steps, watchdog_s)

    def _num_steps(self) -> int:
        return sum(service.engine.stats().num_steps for service in self._services)

    async def _prove_progress(self, num_steps: int, watchdog_s: float) -> int:
        """Feed the watchdog only if steps ended since the last time, or an executor that has none answers."""
        now = self._num_steps()
        if now == num_steps:
            pings = [service.engine.executor.ping() for service in self._services]
            try:
                await asyncio.wait_for(asyncio.gather(*pings), watchdog_s)
            except (TimeoutError, LlmdError) as error:
                log.error("no step ended and the executor does not answer: %s", error or "no answer in time")
                return now
        self._notifier.watchdog()
        return now

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
        if self._reloading is not None and not self._reloading.done():
            log.info("a reload is under way")
            return
        self._reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        """Apply what may change while serving; a file with any mistake changes nothing."""
        if self._read_config is None:
            log.warning("there is no configuration file to reload")
            return
        try:
            new = await in_thread(self._checked_config)
            live = merge_live(self._config, new)
            self._authenticators.rebuild(live)
        except (ConfigError, OSError, ValueError) as error:
            problems = error.problems if isinstance(error, ConfigError) else [str(error)]
            for problem in problems:
                log.error("reload refused: %s", problem)
            return
        found = changes(self._config, new)
        self._config = self._context.config = live
        set_level(live.log.level)
        for change in found:
            log.log(logging.INFO if change.is_live else logging.WARNING, "reload: %s", change.text)
        log.info("reloaded: %d keys changed", len(found))

    def _checked_config(self) -> Config:
        assert self._read_config is not None
        config = self._read_config()
        problems: list[str] = []
        parse_sections(config, self._catalog, problems)
        problems += check_names(config, self._catalog) + check_files(config, self._catalog)
        if problems:
            raise ConfigError(problems)
        return config

    # --- drain

    async def _drain(self, code: ExitCode) -> None:
        """Refuse new requests, let running ones end, abort the rest."""
        timeout_s = self._config.server.drain_timeout_s if code is ExitCode.CLEAN and self._was_ready else 0.0
        patience_s = _GIVE_UP_S if self._was_ready else _LAST_WORDS_S  # a load that is cut short is not waited for
        if code is ExitCode.CLEAN:
            self._context.state = "draining"
        self._notifier.stopping(f"draining, at most {timeout_s:g} s")
        self._notifier.extend_timeout(timeout_s + 10)
        draining = asyncio.ensure_future(self._stop_services(timeout_s))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((draining, hurry), timeout=timeout_s + patience_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not draining.done():
            draining.cancel()
            aborting = asyncio.ensure_future(self._stop_services(0.0))
            if not (await asyncio.wait((aborting,), timeout=patience_s))[0] and self._was_ready:
                log.error("the executor does not stop")
        await asyncio.sleep(_LAST_WORDS_S if code is not ExitCode.CLEAN else 0.0)

    async def _stop_services(self, drain_s: float) -> None:
        """Stop every model; one that cannot must not keep the others from it."""
        stopping = (service.stop(drain_s=drain_s) for service in self._services)
        for answer in await asyncio.gather(*stopping, return_exceptions=True):
            if isinstance(answer, Exception):
                log.error("a model did not stop as it should: %s", answer)


def _ssl_context(config: Config) -> Any:
    server = config.server
    if not server.ssl_certfile:
        return None
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(config.problem(("server", "ssl_certfile"), f"cannot be used: {error}")) from None
    return context


def _cannot_listen(config: Config, error: OSError) -> LlmdError:
    server = config.server
    if server.uds:
        key, address = "uds", repr(server.uds)
    else:
        key = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        address = f"{server.host!r}, port {server.port}"
    # asyncio puts the address into the message once more
    reason = (error.strerror or str(error)).rpartition(": ")[2]
    problem = config.problem(("server", key), f"cannot listen on {address}: {reason}")
    return CannotListen(problem) if error.errno == errno.EADDRINUSE else ConfigError(problem)
