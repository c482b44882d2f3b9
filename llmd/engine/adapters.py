"""The adapters of one engine, as those see them who load, list and unload them. Lives on the loop thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from llmd.engine.adapter_slots import AdapterEntry, AdapterInfo, AdapterSlots
from llmd.engine.executor import Executor
from llmd.errors import AdapterError, AdapterNotFound, LlmdError, NotReady

log = logging.getLogger(__name__)

_MAX_NAME = 256


class AdapterStore:
    """Loads adapters beside the steps and keeps the scheduler's ledger true.

    `refuse` ends requests that waited for files which cannot be used; `wake` lets the step loop look again.
    """

    def __init__(
        self,
        executor: Executor,
        slots: AdapterSlots,
        *,
        refuse: Callable[[list[str], str], None],
        wake: Callable[[], None],
    ) -> None:
        self._executor, self._slots = executor, slots
        self._refuse, self._wake = refuse, wake
        self._tasks: set[asyncio.Task[None]] = set()
        self._being_loaded: set[str] = set()

    @property
    def is_enabled(self) -> bool:
        """Whether this model serves adapters."""
        return self._slots.is_enabled

    def has(self, name: str) -> bool:
        """Whether requests may ask for an adapter of this name."""
        return self._slots.get(name) is not None

    def list(self) -> list[AdapterInfo]:
        """Every adapter that is known, and those that still drain."""
        return self._slots.infos()

    def declare(self, name: str, path: str) -> None:
        """Know an adapter whose files are read when it is first asked for. Raises AdapterError."""
        self._check_name(name, replace=False)
        self._slots.publish(self._slots.make(name, path))

    async def load(self, name: str, path: str, *, replace: bool = False) -> AdapterInfo:
        """Read an adapter now. With `replace`, new requests go to it and those under way end with the one before.

        Raises AdapterError for a name or files that cannot be used; then everything is as it was.
        """
        self._check_name(name, replace=replace)
        entry = self._slots.make(name, path)
        self._being_loaded.add(name)
        try:
            await self._read(entry)
        except BaseException:
            self._slots.retire(entry)
            raise
        finally:
            self._being_loaded.discard(name)
        self._slots.publish(entry)
        self.run_errands()
        log.info("adapter %s: rank %d, %.1f MB", name, entry.facts.rank, entry.facts.num_bytes / 1e6)
        return entry.info

    async def unload(self, name: str) -> None:
        """Take no more requests for an adapter and return when those under way have ended. Raises AdapterNotFound."""
        entry = self._slots.get(name)
        if entry is None:
            raise AdapterNotFound(f"no adapter is named {name!r}", param="lora_name")
        gone = asyncio.Event()
        self._slots.retire(entry, gone.set)
        self.run_errands()
        await gone.wait()
        self.run_errands()

    def _check_name(self, name: str, *, replace: bool) -> None:
        if not self.is_enabled:
            raise AdapterError("adapters are not served: enable_lora is off", param="lora_name")
        if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise AdapterError(f"lora_name must have 1 to {_MAX_NAME} printable characters", param="lora_name")
        if name in self._being_loaded:
            raise AdapterError(f"adapter {name!r} is being loaded", param="lora_name")
        if self.has(name) and not replace:
            raise AdapterError(f"adapter {name!r} is loaded; load it in place to replace it", param="lora_name")

    async def _read(self, entry: AdapterEntry) -> None:
        read: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settle(error: Exception | None) -> None:
            if not read.done():
                read.set_result(None) if error is None else read.set_exception(error)

        entry.on_read.append(settle)
        self._slots.want(entry)
        self.run_errands()
        await read

    # --- errands

    def run_errands(self) -> None:
        """Have the executor read and drop what the ledger says; called whenever it has something to take."""
        for adapter_id in self._slots.take_drops():
            self._executor.unload_adapter(adapter_id)
        for entry in self._slots.take_reads():
            task = asyncio.get_running_loop().create_task(self._load(entry), name=f"llmd-adapter-{entry.adapter_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        for adapter_id in self._slots.take_drops():  # those that went for what is read
            self._executor.unload_adapter(adapter_id)

    async def _load(self, entry: AdapterEntry) -> None:
        try:
            facts = await self._executor.load_adapter(entry.adapter_id, entry.path)
        except LlmdError as error:
            self._failed(entry, error)
        except Exception as error:  # a reader's own fault must not leave its requests waiting
            log.exception("adapter %s: reading failed", entry.name)
            self._failed(entry, AdapterError(f"adapter {entry.name!r} cannot be read: {type(error).__name__}"))
        else:
            self._slots.loaded(entry, facts)
        self.run_errands()
        self._wake()

    def _failed(self, entry: AdapterEntry, error: LlmdError) -> None:
        log.warning("adapter %s cannot be loaded: %s", entry.name, error)
        self._refuse(self._slots.failed(entry, error), f"adapter {entry.name!r} cannot be loaded: {error}")

    async def stop(self) -> None:
        """Let go of what is being read."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._slots.abandon(NotReady("the model is not taking adapters any more"))
