"""The end of a process that cannot end as it should: stacks on stderr, and an exit that no stuck thread can hold up."""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
import threading

from llmd.errors import ExitCode

log = logging.getLogger("llmd.daemon")


def tell_of_crashes() -> None:
    """A fatal signal (SIGSEGV in a kernel, say) writes every thread's stack to stderr first."""
    try:
        if not faulthandler.is_enabled():
            faulthandler.enable()
    except (io.UnsupportedOperation, AttributeError, ValueError):
        log.debug("stderr is no file: a crash leaves no stacks")


class Deadline:
    """Ends the process for certain, some time after it has failed, unless somebody else ends it first."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def set(self, code: ExitCode, after_s: float) -> None:
        """From now on there are so many seconds for last words; the first call counts."""
        if self._timer is None:
            self._timer = threading.Timer(after_s, _exit, (code,))
            self._timer.daemon = True
            self._timer.name = "llmd-deadline"
            self._timer.start()

    def cancel(self) -> None:
        """The end was reached in time."""
        if self._timer is not None:
            self._timer.cancel()


def _exit(code: ExitCode) -> None:
    log.error("the end takes too long: the process leaves at once with exit code %d", code)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)
