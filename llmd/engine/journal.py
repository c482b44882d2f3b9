"""Which prompts were running when the process died, and what becomes of them when they come again.

    row given ─► digest written into the row's slot      row released, idle, clean end ─► slot cleared
    next start: digests still there were running in a crash ─► suspects: run alone; a second crash running ─► refused

A slot is written with one pwrite, so a `kill -9` loses nothing and a full disk only turns the journal off.
"""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Sequence as Seq
from hashlib import blake2b
from typing import Any, NamedTuple

from llmd.engine.request import WARM_UP, Request
from llmd.engine.step import StepPlan
from llmd.errors import InvalidRequest
from llmd.state import StateFolder, slug

log = logging.getLogger(__name__)

_DIGEST_BYTES = 16
_SLOT_BYTES = 64  # the digest, then as much of the request's id as fits
_EMPTY = bytes(_SLOT_BYTES)
_MAX_BYTES = 65536 * _SLOT_BYTES
_MAX_SUSPECTS = 4096
_MAX_CRASHES = 2


class Left(NamedTuple):
    """A prompt that was running when the last process died."""

    digest: str
    request_id: str


def prompt_digest(token_ids: Seq[int], adapter: str | None) -> bytes:
    """What tells a prompt again: its tokens and the adapter, not how it is sampled."""
    digest = blake2b(array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES)
    digest.update((adapter or "").encode(errors="surrogatepass"))
    return digest.digest()


class Journal:
    """One slot a row in a file of this process alone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._used: set[int] = set()

    @classmethod
    def open(cls, folder: StateFolder, name: str) -> tuple[Journal, list[Left]] | None:
        """The journal, emptied, and what the last process left in it; None where it cannot be kept."""
        try:
            import fcntl
        except ImportError:  # there is none for Windows
            return None
        try:
            descriptor = os.open(folder.path / f"running-{slug(name)}.bin", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left = _read_slots(os.pread(descriptor, _MAX_BYTES, 0))
                os.ftruncate(descriptor, 0)
            except OSError:
                os.close(descriptor)
                raise
        except BlockingIOError:
            log.warning("the journal of running requests belongs to another process: this one keeps none")
            return None
        except OSError as error:
            log.warning("no journal of running requests is kept: %s", error.strerror)
            return None
        return cls(descriptor), left

    def note(self, plan: StepPlan) -> None:
        """A step is about to be submitted: these rows are free, those are taken."""
        for row in plan.released:
            self._write(row, _EMPTY)
            self._used.discard(row)
        for admit in plan.admitted:
            if admit.request_id.startswith(WARM_UP):
                continue
            digest = prompt_digest(admit.token_ids[: admit.num_prompt_tokens], admit.adapter)
            name = admit.request_id.encode(errors="replace")[: _SLOT_BYTES - _DIGEST_BYTES]
            self._write(admit.row, (digest + name).ljust(_SLOT_BYTES, b"\0"))
            self._used.add(admit.row)

    def _write(self, row: int, slot: bytes) -> None:
        if self._descriptor is None:
            return
        try:
            os.pwrite(self._descriptor, slot, row * _SLOT_BYTES)
        except OSError as error:
            log.warning("the journal of running requests ends: %s", error.strerror)
            self._shut()

    def clear(self) -> None:
        """Nothing runs."""
        for row in self._used:
            self._write(row, _EMPTY)
        self._used.clear()

    def close(self) -> None:
        """A clean end: nobody is suspected of it."""
        self.clear()
        self._shut()

    def _shut(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read_slots(content: bytes) -> list[Left]:
    slots = [content[first : first + _SLOT_BYTES] for first in range(0, len(content), _SLOT_BYTES)]
    return [
        Left(slot[:_DIGEST_BYTES].hex(), slot[_DIGEST_BYTES:].rstrip(b"\0").decode(errors="replace"))
        for slot in slots
        if len(slot) == _SLOT_BYTES and any(slot[:_DIGEST_BYTES])
    ]


class Suspects:
    """Prompts that were running in a crash: how often, and when last. Kept in the state directory."""

    def __init__(self, folder: StateFolder, name: str, refuse_s: float, now_s: float | None = None) -> None:
        self._folder, self._file, self._refuse_s = folder, f"suspects-{slug(name)}.json", refuse_s
        oldest_s = (time.time() if now_s is None else now_s) - refuse_s
        stored = {digest: entry for digest, entry in folder.read(self._file).items() if _is_entry(entry)}
        self._found: dict[str, dict[str, Any]] = {d: entry for d, entry in stored.items() if entry["last_s"] > oldest_s}

    def __bool__(self) -> bool:
        return bool(self._found)

    def accuse(self, left: Seq[Left], now_s: float | None = None) -> None:
        """These were running when the last process died."""
        now_s = time.time() if now_s is None else now_s
        for digest, request_id in dict(left).items():
            crashes = self._found.get(digest, {"crashes": 0})["crashes"] + 1
            self._found[digest] = {"crashes": crashes, "last_s": now_s, "request_id": request_id}
            fate = "refused" if crashes >= _MAX_CRASHES else "run alone"
            log.warning("request %s was running when the last process died: its prompt will be %s", request_id, fate)
        newest = sorted(self._found.items(), key=lambda item: item[1]["last_s"])[-_MAX_SUSPECTS:]
        self._found = dict(newest)
        self._store()

    def crashes(self, request: Request) -> int:
        """In how many crashes the request's prompt was running. Raises InvalidRequest after the second, for a while."""
        if not self._found or request.request_id.startswith(WARM_UP):
            return 0
        digest = prompt_digest(request.prompt.token_ids, request.adapter).hex()
        entry = self._found.get(digest)
        if entry is None or time.time() - entry["last_s"] > self._refuse_s:
            return 0
        if entry["crashes"] >= _MAX_CRASHES:
            raise InvalidRequest(
                f"this prompt was running when the server crashed, {entry['crashes']} times in a row: it is refused for "
                f"{self._refuse_s - (time.time() - entry['last_s']):.0f} s more",
                param="prompt",
                code="suspected_of_crash",
            )
        return int(entry["crashes"])

    def acquit(self, request: Request) -> None:
        """It ran, and the process lives."""
        digest = prompt_digest(request.prompt.token_ids, request.adapter).hex()
        if self._found.pop(digest, None) is not None:
            log.info("request %s did no harm this time", request.request_id)
            self._store()

    def _store(self) -> None:
        self._folder.write(self._file, self._found)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("crashes"), int) and isinstance(entry.get("last_s"), int | float)
