"""The state directory: small files that outlive the process. Nothing here ever raises for a disk that is full or gone."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

log = logging.getLogger("llmd.state")


class StateFolder:
    """A folder of records and journals; every failure is one line in the log and an answer of None."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def find(cls, configured: str | None) -> StateFolder | None:
        """The configured folder, or systemd's; None: nothing is kept."""
        given = configured or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
        if not given:
            return None
        path = Path(given)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("the state directory cannot be used: %s", error)
            return None
        return cls(path)

    def write(self, name: str, content: Mapping[str, Any]) -> Path | None:
        """Put JSON into a file, whole or not at all."""
        target = self.path / name
        draft = target.with_name(f".{name}.{os.getpid()}")
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)  # it may hold prompts
            with os.fdopen(descriptor, "wb") as file:
                file.write(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS, default=repr))
            draft.replace(target)
        except (OSError, orjson.JSONEncodeError) as error:
            log.warning("%s cannot be written: %s", name, error)
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            return None
        return target

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object of a file; empty where there is none that can be read."""
        try:
            content = orjson.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read: %s", name, error)
            return {}
        return content if isinstance(content, dict) else {}

    def write_record(self, kind: str, content: Mapping[str, Any], keep: int) -> Path | None:
        """A new file `<kind>-<UTC time>-<pid>.json`, of which the newest `keep` stay."""
        now_s = time.time()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_s)) + f".{int(now_s * 1e3) % 1000:03d}"
        written = self.write(f"{kind}-{stamp}-{os.getpid()}.json", content)
        try:
            old = sorted(self.path.glob(f"{kind}-*.json"))[:-keep]
            for file in old:
                file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("old records cannot be removed: %s", error)
        return written


def slug(name: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "model"
