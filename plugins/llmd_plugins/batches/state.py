"""Files and batches on disk. Names in the folder are made here and checked on their way in: no client's word is a path.

    files/file-<hex>.data   what was uploaded, or what a batch wrote
    files/file-<hex>.json   its facts and its owner
    batches/batch_<hex>.json            how far it is
    batches/batch_<hex>.output, .errors   lines answered so far, which become files when it ends
    lock                    held by the one daemon that uses the folder

Every JSON file is replaced as a whole, so a crash leaves the old state or the new one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from llmd.api.v1 import RequestRefused

if TYPE_CHECKING:
    from llmd.api.v1 import ServerContext
    from llmd_plugins.batches import BatchesSettings

logger = logging.getLogger("llmd.batches")

Record = dict[str, Any]

FINAL = ("completed", "failed", "cancelled", "expired")
_NAMES = {"files": re.compile(r"file-[0-9a-f]{32}"), "batches": re.compile(r"batch_[0-9a-f]{32}")}


def default_folder() -> Path:
    """systemd's state directory, or the user's. Raises RuntimeError where there is no home."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given) / "batches"
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "llmd" / "batches"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def shown(record: Record) -> Record:
    """A record as its owner sees it."""
    return {name: value for name, value in record.items() if name != "key"}


class State:
    """Loop thread only, but for reading and writing data files."""

    def __init__(self, settings: BatchesSettings) -> None:
        self.settings = settings
        self.records: dict[str, dict[str, Record]] = {"files": {}, "batches": {}}
        self._folder: Path | None = None
        self._lock: int | None = None

    # --- the folder

    def exists(self) -> bool:
        """Whether there is a folder from an earlier time."""
        with suppress(OSError, RuntimeError):
            return self._place().is_dir()
        return False

    def _place(self) -> Path:
        return Path(self.settings.directory) if self.settings.directory is not None else default_folder()

    def open(self) -> Path:
        """Make and lock the folder, and read what is in it, the first time. Raises RequestRefused."""
        if self._folder is not None:
            return self._folder
        try:
            folder = self._place()
            for name in ("files", "batches"):
                (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            self._take_lock(folder)
            for name in ("files", "batches"):
                self._read(folder / name, name)
        except (OSError, RuntimeError) as error:
            logger.error("files and batches cannot be kept: %s", error)
            self.close()
            message = "files and batches cannot be kept now: the state directory is not usable"
            raise RequestRefused(503, message, type="server_error", code="storage_unavailable") from None
        self._folder = folder
        return folder

    def _take_lock(self, folder: Path) -> None:
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another daemon uses {folder} ([plugins.batches] directory)") from None

    def _read(self, folder: Path, kind: str) -> None:
        found = []
        for path in folder.glob("*.json"):
            if _NAMES[kind].fullmatch(path.stem):
                try:
                    found.append(orjson.loads(path.read_bytes()))
                except ValueError:
                    logger.warning("%s is not JSON, it is left out", path)
        found.sort(key=lambda record: (record["created_at"], record["id"]))
        self.records[kind] = {record["id"]: record for record in found}
        for draft in folder.glob(".*"):
            draft.unlink()

    def close(self) -> None:
        """Let another daemon have the folder."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = self._folder = None

    # --- records

    def get(self, kind: str, name: str, key: str) -> Record:
        """A file or batch of this owner. Raises RequestRefused with 404."""
        record = self.records[kind].get(name) if self.exists() and self.open() else None
        if record is None or record["key"] != key:
            noun = "file" if kind == "files" else "batch"
            raise RequestRefused(404, f"there is no {noun} {name[:80]!r}", code=f"{noun}_not_found")
        return record

    def save(self, kind: str, record: Record) -> None:
        """Write a record, new or changed."""
        self.records[kind][record["id"]] = record
        write_atomically(self.open() / kind / f"{record['id']}.json", orjson.dumps(record))

    def data(self, file_id: str) -> Path:
        """Where a file's bytes are."""
        return self.open() / "files" / f"{_checked('files', file_id)}.data"

    def journal(self, batch_id: str, kind: str) -> Path:
        """Where a batch's answers (`output`) and refusals (`errors`) grow."""
        return self.open() / "batches" / f"{_checked('batches', batch_id)}.{kind}"

    def add_file(self, draft: Path, file_id: str, key: str, filename: str, purpose: str) -> Record:
        """Take a written file over as this file's data."""
        record = {
            "id": file_id, "object": "file", "bytes": draft.stat().st_size, "created_at": int(time.time()),
            "filename": filename, "purpose": purpose, "status": "processed", "expires_at": None, "key": key,
        }  # fmt: skip
        draft.replace(self.data(file_id))
        self.save("files", record)
        return record

    def delete_file(self, file_id: str) -> None:
        """Forget a file. Raises RequestRefused while a batch needs it."""
        for batch in self.records["batches"].values():
            if batch["input_file_id"] == file_id and batch["status"] not in FINAL:
                message = f"the file is the input of {batch['id']}, which has not ended: cancel that first"
                raise RequestRefused(400, message, code="file_in_use", param="file_id")
        (self.open() / "files" / f"{_checked('files', file_id)}.json").unlink(missing_ok=True)
        self.data(file_id).unlink(missing_ok=True)
        self.records["files"].pop(file_id, None)

    def forget_old_batches(self) -> None:
        """Make room for one more. Raises RequestRefused where all that are kept are still to be done."""
        batches = self.records["batches"]
        while len(batches) >= self.settings.max_batches:
            name = next((name for name, batch in batches.items() if batch["status"] in FINAL), None)
            if name is None:
                message = f"{len(batches)} batches wait already ([plugins.batches] max_batches)"
                raise RequestRefused(429, message, type="rate_limit_error", code="too_many_batches")
            (self.open() / "batches" / f"{name}.json").unlink(missing_ok=True)
            del batches[name]

    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record["bytes"] for record in self.records["files"].values())


def _checked(kind: str, name: str) -> str:
    if not _NAMES[kind].fullmatch(name):
        raise RequestRefused(404, f"there is no {name[:80]!r}", code="not_found")
    return name


def new_id(kind: str) -> str:
    """The name of a new file or batch."""
    return ("file-" if kind == "files" else "batch_") + secrets.token_hex(16)


def state_of(context: ServerContext) -> State:
    """The one state that routes and runner share."""
    state: State | None = context.shared.get("batches")
    if state is None:
        state = context.shared["batches"] = State(context.settings("batches"))
    return state
