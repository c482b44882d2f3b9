"""Errors that cross a layer. Each names the field or key, the value and what is allowed; none carries a path."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

_MAX_SHOWN_ENTRIES = 80  # of a value that is wrong


class ExitCode(IntEnum):
    """What the process tells its supervisor (systemd: RestartPreventExitStatus=78)."""

    CLEAN = 0
    DEVICE_GONE = 69
    INTERNAL = 70
    TRY_AGAIN = 75
    CONFIGURATION = 78


class LlmdError(Exception):
    """Anything that llmd raises on purpose."""


class ConfigError(LlmdError):
    """The configuration cannot be used. `problems` holds one complete line per mistake; exit code 78."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class InvalidRequest(LlmdError, ValueError):
    """A request that cannot be served as it is: HTTP 400. `param` is the field as the client wrote it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class InvalidParams(InvalidRequest):
    """A field of SamplingParams or PoolingParams is out of bounds."""

    def __init__(self, param: str, value: Any, allowed: str) -> None:
        is_long = isinstance(value, list | tuple | dict) and len(value) > _MAX_SHOWN_ENTRIES
        shown = f"{len(value)} entries" if is_long else repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{param} must be {allowed}, got {shown}", param=param)


class ModelNotFound(InvalidRequest):
    """No served model has that name: HTTP 404."""


class AdapterError(InvalidRequest):
    """An adapter that cannot be loaded or used as asked: HTTP 400. Names the file's key or tensor, never its folder."""


class AdapterNotFound(AdapterError, ModelNotFound):
    """No adapter has that name: HTTP 404."""


class Overloaded(LlmdError):
    """The waiting queue is full: HTTP 429 with Retry-After, raised before anything is tokenized."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(LlmdError):
    """Loading, draining or failed: HTTP 503."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelError(LlmdError):
    """A checkpoint, tokenizer or architecture that cannot be loaded; names the file or tensor. Exit code 78."""


class CannotListen(LlmdError):
    """The address is taken, perhaps by a daemon that is still ending: exit code 75, try again."""


class StepFailed(LlmdError):
    """One step raised, the device is well: the step's sequences end with `error`, the engine goes on."""


class StepOutOfMemory(StepFailed):
    """One step found no memory: its sequences are computed again in smaller steps, nothing is lost."""


class ExecutorHangs(LlmdError):
    """No sign of progress within the bound: every request ends, exit code 70, even if a thread never returns."""


class EngineFailure(LlmdError):
    """The executor cannot go on (device context lost, thread died): every request ends, exit code 69."""
