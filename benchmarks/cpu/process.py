"""An engine's process, seen from outside: orders with a deadline, stopped whenever it is not its turn."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from .machine import Use, group_peak_bytes

HOST = Path(__file__).parent / "host.py"
_READ_BYTES = 1 << 16
_TAIL_LINES = 12
_QUIT_S = 20.0


class EngineFailure(Exception):
    """The engine's process died, hung, or answered with an error; the message says which and what it last wrote."""


class Command(NamedTuple):
    """How to start an engine's process."""

    python: str
    adapter: str  # a module of engines/, or a path
    environment: Mapping[str, str]


class EngineProcess:
    """Runs in a group of its own, so that it can be stopped, counted and killed together with what it starts.

    Between orders the whole group is stopped (SIGSTOP): a loaded engine whose threads spin while they wait takes nothing
    from the one that is measured.
    """

    def __init__(self, name: str, command: Command, log: Path) -> None:
        self.name, self._log, self._rest, self._is_killed = name, log, b"", False
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [command.python, "-u", str(HOST), command.adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | command.environment,
                start_new_session=True,
            )
        self.group = self._process.pid
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe(self._process.stdout), selectors.EVENT_READ)

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def order(self, timeout_s: float, **order: Any) -> dict[str, Any]:
        """Give an order and wait for its answer, with the share of the machine that others took meanwhile as `foreign`.

        Raises EngineFailure, after killing the process, when it dies, hangs or refuses.
        """
        if self._is_killed:
            raise EngineFailure(f"{self.name} has ended")
        self._signal(signal.SIGCONT)
        before = Use.now(self.group)
        try:
            self._write(json.dumps(order).encode() + b"\n")
            answer = json.loads(self._line(timeout_s))
        except EngineFailure:
            self.kill()
            raise
        foreign = before.foreign_until(Use.now(self.group))
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            self.kill()
            raise EngineFailure(f"{self.name}: {answer['error']}{self._tail()}")
        return answer | {"foreign": foreign}

    def _write(self, line: bytes) -> None:
        try:
            pipe = self._pipe(self._process.stdin)
            pipe.write(line)
            pipe.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not self._selector.select(left):
                raise EngineFailure(f"{self.name} has not answered for {timeout_s:.0f} s{self._tail()}")
            piece = os.read(self._pipe(self._process.stdout).fileno(), _READ_BYTES)
            if not piece:
                raise self._ended()
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _ended(self) -> EngineFailure:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return EngineFailure(f"{self.name} has closed its pipes{self._tail()}")
        return EngineFailure(f"{self.name} ended with {code}{self._tail()}")

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return "".join(f"\n    {line}" for line in lines)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # its id is still its own
            with suppress(ProcessLookupError):  # it has died: the order that finds out says so
                os.killpg(self.group, number)

    def peak_bytes(self) -> int:
        """The most memory it has had resident, with what it started."""
        return group_peak_bytes(self.group)

    def close(self) -> None:
        """Let it end by itself, or end it; nothing where it has been killed."""
        if self._is_killed:
            return
        self._signal(signal.SIGCONT)
        with suppress(EngineFailure, subprocess.TimeoutExpired):
            self._write(b'{"op": "quit"}\n')
            self._process.wait(_QUIT_S)
        self.kill()

    def kill(self) -> None:
        """End it and everything that it started."""
        if self._is_killed:
            return
        self._is_killed = True
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)  # also when it has ended itself: what it started may live on
        self._process.wait()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                self._pipe(pipe).close()
