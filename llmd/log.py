"""Log lines on stderr, as text or JSON, or entries of the journal: each with the id of the request that it is about."""

from __future__ import annotations

import contextvars
import logging
import sys
import time
from typing import Any, TextIO

import orjson

from llmd.config import LogConfig
from llmd.journald import JournalHandler, is_journal

# set by the HTTP layer around the handling of a request
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("llmd_request_id", default="")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id", "taskName"}
# libraries that write a line for each thing they do, at a level that is not meant for an operator
_QUIET = ("asyncio", "filelock", "httpx", "httpcore", "huggingface_hub", "urllib3", "fsspec")


def _request_id(record: logging.LogRecord) -> str:
    return getattr(record, "request_id", "") or request_id.get()


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class TextFormatter(logging.Formatter):
    """`2026-11-20 14:03:21.482 WARNING llmd.plugin: message [request id]`"""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback's lines where there is one."""
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{clock}.{int(record.msecs):03d} {record.levelname:<7} {record.name}: {record.getMessage()}"
        if found := _request_id(record):
            line += f" [{found}]"
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what was given as `extra` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if found := _request_id(record):
            entry["request_id"] = found
        entry.update(_extra(record))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class _Stderr(logging.StreamHandler):
    """Writes to stderr as it is now, past a progress bar if one is drawn."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Nothing to keep: stderr is looked up for each line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line above the bars."""
        if "tqdm" in sys.modules and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(self.format(record), file=sys.stderr)
        else:
            super().emit(record)


def _all_extras(record: logging.LogRecord) -> dict[str, Any]:
    return {"request_id": _request_id(record), **_extra(record)}


def _leads_to_journal() -> bool:
    """Whether stderr is the journal; it may be no file at all."""
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return sys.platform == "linux" and is_journal(descriptor)


def _handler(form: str) -> logging.Handler:
    if form == "journald" or (form == "auto" and _leads_to_journal()):
        return JournalHandler(_all_extras, TextFormatter())
    handler = _Stderr()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    return handler


def setup(config: LogConfig) -> None:
    """Send all log lines where and in the form that the configuration wants; may be called again."""
    handler = _handler(config.format)
    root = logging.getLogger()
    for before in root.handlers:
        if isinstance(before, JournalHandler):
            before.close()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    set_level(config.level)


def set_level(level: str) -> None:
    """Change the level of llmd and of plugins' loggers; chatty libraries stay at warning."""
    number = logging.getLevelName(level.upper())
    logging.getLogger().setLevel(number)
    logging.getLogger("llmd").setLevel(number)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
