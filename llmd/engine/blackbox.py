"""What is left behind when the process ends badly: flight records, and the journal of running requests."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from llmd._version import __version__
from llmd.config import HealthConfig
from llmd.engine.executor import ExecutorInfo
from llmd.engine.flight import FlightRecorder, FlightStep
from llmd.engine.isolation import IsolatingQueue, isolate
from llmd.engine.journal import Journal, Suspects
from llmd.engine.queue import WaitingQueue
from llmd.engine.request import Request
from llmd.engine.sequence import Sequence
from llmd.engine.step import StepPlan
from llmd.state import StateFolder

log = logging.getLogger(__name__)


class BlackBox:
    """Of one engine. Without a state directory only the flight recorder runs, for whoever asks while the process lives."""

    def __init__(self, config: HealthConfig, name: str, model: str) -> None:
        self.recorder = (
            FlightRecorder(config.flight_steps, with_tokens=config.flight_tokens) if config.flight_steps else None
        )
        self.keeps_tokens = config.flight_tokens
        self._config, self._name, self._model = config, name, model
        self._folder: StateFolder | None = None
        self._journal: Journal | None = None
        self._suspects: Suspects | None = None
        self._queue: IsolatingQueue | None = None

    def open(self, waiting: WaitingQueue, running: Callable[[], Seq[Sequence]]) -> WaitingQueue:
        """Read what the last process left behind; the waiting queue, with its suspects kept apart."""
        self._folder = StateFolder.find(self._config.state_dir)
        if self._folder is None or not self._config.refuse_suspects_s:
            return waiting
        if (opened := Journal.open(self._folder, self._name)) is None:
            return waiting
        self._journal, left = opened
        self._suspects = Suspects(self._folder, self._name, self._config.refuse_suspects_s)
        if left:
            self._suspects.accuse(left)
        if not self._suspects:
            return waiting
        self._queue = isolate(waiting, self._suspects, running)
        return self._queue

    def replace(self, waiting: WaitingQueue, running: Callable[[], Seq[Sequence]]) -> WaitingQueue:
        """Another waiting queue in the place of the one that was opened."""
        if self._queue is None or self._suspects is None:
            return waiting
        self._queue = isolate(waiting, self._suspects, running)
        return self._queue

    def check(self, request: Request) -> None:
        """Raise InvalidRequest for a prompt that was running in too many crashes."""
        if self._suspects:
            self._suspects.crashes(request)

    def submitted(self, plan: StepPlan, schedule_s: float, queue: tuple[int, int, int, int]) -> FlightStep | None:
        """A step is about to be submitted."""
        if self._journal is not None and (plan.admitted or plan.released):
            self._journal.note(plan)
        return None if self.recorder is None else self.recorder.record(plan, schedule_s, queue)

    def idle(self) -> None:
        """Nothing runs."""
        if self._journal is not None:
            self._journal.clear()

    def content(self, reason: str, info: ExecutorInfo, error: BaseException | None = None, **facts: Any) -> dict[str, Any]:
        """A flight record; empty where none is kept."""
        if self.recorder is None:
            return {}
        told = "".join(traceback.format_exception(error)) if error is not None else None
        facts |= {"version": __version__, "python": sys.version.split()[0], "name": self._name, "model": self._model}
        return self.recorder.content(info, reason=reason, error=told, **facts)

    def write(self, content: dict[str, Any]) -> Path | None:
        """Put a flight record into the state directory; never raises."""
        if self._folder is None or not content:
            return None
        written = self._folder.write_record("flight", content, self._config.max_flight_records)
        if written is not None:
            log.warning("%s: the last %d steps are in %s", content["reason"], len(content["steps"]), written)
        return written

    def close(self) -> None:
        """A clean end."""
        if self._journal is not None:
            self._journal.close()
