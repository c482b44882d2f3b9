"""The measuring: round by round, format by format, work by work, each engine in its turn.

    round ── format ── read pass: the memory bandwidth of this minute
                    ├─ start each engine's process, timed
                    ├─ work ── engine: warm up · wait for a quiet machine · run
                    │        └ the next engine …        the first in turn is another one each round
                    └─ peak memory · end of the processes

Engines of one format are loaded together; all are stopped but the one whose turn it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from .engine_list import ENGINES, LLMD_FRESH, LLMD_HTTP, OURS
from .found import Found, Key, Plan, Sample, better
from .machine import Quiet
from .process import EngineFailure
from .works import FIRST_TOKEN, HTTP, MEMORY, MORE_OF, SERVED, START, Order

_NOISY_S = 0.08  # below it a share may come of the counters, which go in hundredths of a second
_LOADS_LONGER = 3  # times as long as any other call: engines compile, and caches are cold
_KEEP_AFTER_S = 20.0  # an engine that takes longer to start is started once, not every round


class Engine(Protocol):
    """What is asked of an EngineProcess."""

    def order(self, timeout_s: float, **order: Any) -> dict[str, Any]: ...
    def peak_bytes(self) -> int: ...
    def close(self) -> None: ...


class Noisy(Exception):
    """Something else uses the machine, and only figures of a quiet one are wanted."""


class Machine(NamedTuple):
    """What the rounds do outside themselves; tests bring their own."""

    launch: Callable[[str, str], Engine]  # of an engine's name and a format
    model_path: Callable[[str, str], str]
    read_through: Callable[[str], None]  # so that a model's files are in the page cache
    wait_until_quiet: Callable[[], Quiet]
    read_bandwidth: Callable[[], float]
    say: Callable[[str], None]
    clock: Callable[[], float] = time.perf_counter


def foreign_use(answers: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """What others took over several calls: the share of the machine, and for how many seconds they could have had all."""
    taken_s = sum(answer["foreign"] * answer["seconds"] for answer in answers)
    return taken_s / sum(answer["seconds"] for answer in answers), taken_s


class Rounds:
    """Carries out a plan."""

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self._plan, self._machine, self._found = plan, machine, Found()
        self._running: dict[tuple[str, str], Engine] = {}  # by engine and format
        self._slow_to_start: set[tuple[str, str]] = set()
        self._out: set[Key] = set()  # given no more of that work
        self._costs: dict[Key, float] = {}  # seconds that each took when last run
        self._began = machine.clock()

    def run(self, after_round: Callable[[Found], object]) -> Found:
        """All rounds; `after_round` gets what is known so far."""
        try:
            for number in range(1, self._plan.rounds + 1):
                works = self._affordable(number)
                for model_format in self._plan.engines:
                    self._run_format(number, model_format, works[model_format])
                after_round(self._found)
        finally:
            for engine in self._running.values():
                engine.close()
        return self._found

    def _affordable(self, number: int) -> dict[str, list[str]]:
        """The works of each format in a round; the dearest are left out where the budget does not cover all."""
        works = {model_format: list(self._plan.served) for model_format in self._plan.engines}
        left_s = self._plan.budget_s - (self._machine.clock() - self._began)
        for_round_s = left_s / (self._plan.rounds - number + 1)
        costs = self._expected_costs()
        while sum(costs.values()) > for_round_s:
            dearest = max((unit for unit in costs if unit[1] != START), key=costs.__getitem__, default=None)
            if dearest is None:
                break
            del costs[dearest]
            works[dearest[0]].remove(dearest[1])
            self._note(f"round {number}: no time for {' '.join(dearest)}")
        return works

    def _expected_costs(self) -> dict[tuple[str, str], float]:
        """Seconds of each format and work, by those who still take part and what it took them last."""
        costs: dict[tuple[str, str], float] = {}
        for key, seconds in self._costs.items():
            if key not in self._out and not (key.work == START and (key.engine, key.model_format) in self._slow_to_start):
                costs[key[:2]] = costs.get(key[:2], 0.0) + seconds
        return costs

    def _note(self, text: str) -> None:
        self._found.notes.append(text)
        self._machine.say(text)

    def _run_format(self, number: int, model_format: str, works: Sequence[str]) -> None:
        names = [name for name in self._plan.engines[model_format] if self._has_work(model_format, name, works)]
        if not names:
            return
        self._quiet()
        self._found.bandwidths[model_format, number] = speed = self._machine.read_bandwidth()
        self._machine.say(f"round {number}, {model_format}: memory reads at {speed / 1e9:.1f} GB/s")
        turn = (number - 1) % len(names)
        for work in (START, *works):
            for name in (*names[turn:], *names[:turn]):
                began = self._machine.clock()
                self._take_turn(number, key := Key(model_format, work, name))
                self._costs[key] = self._machine.clock() - began
            self._sit_out(model_format, work)
        self._end_format(number, model_format)

    def _has_work(self, model_format: str, name: str, works: Sequence[str]) -> bool:
        wanted = [*works, START] if START in self._plan.works else works
        return any(self._takes_part(Key(model_format, work, name)) for work in wanted)

    def _takes_part(self, key: Key) -> bool:
        return self._plan.has_part(key) and key not in self._out

    def _take_turn(self, number: int, key: Key) -> None:
        """One engine at one work; an engine that fails is out for good."""
        process = (key.engine, key.model_format)
        try:
            if key.work == START:
                if process not in self._running:
                    self._start(number, key)
            elif process in self._running and self._takes_part(key):
                self._serve(number, key)
        except EngineFailure as failure:
            self._note(str(failure))
            self._found.failures[" ".join(process)] = str(failure)
            if (engine := self._running.pop(process, None)) is not None:
                engine.close()
            self._out |= {key._replace(work=work) for work in (START, *SERVED)}

    def _start(self, number: int, key: Key) -> None:
        """From nothing to the first token."""
        machine, timeout_s = self._machine, self._plan.timeout_s
        path = machine.model_path(key.engine, key.model_format)
        machine.read_through(path)
        quiet, began = self._quiet(), machine.clock()
        engine = machine.launch(key.engine, key.model_format)
        try:
            settings = dict(ENGINES[key.engine].settings)
            options = {**self._plan.options, "format": key.model_format, "settings": settings}
            loaded = engine.order(_LOADS_LONGER * timeout_s, op="load", model=path, options=options)
            answer = engine.order(timeout_s, op="generate", **FIRST_TOKEN._asdict())
        except BaseException:
            engine.close()
            raise
        seconds = machine.clock() - began
        if key.engine == LLMD_FRESH:
            engine.close()
        else:
            self._running[key.engine, key.model_format] = engine
        self._found.facts[key.engine] = loaded["facts"]
        if seconds > _KEEP_AFTER_S:
            self._slow_to_start.add((key.engine, key.model_format))
        if key.engine != LLMD_HTTP:
            self._keep(number, key, seconds, quiet, [loaded, answer])

    def _serve(self, number: int, key: Key) -> None:
        """Warm up, wait for quiet, run."""
        engine, work, timeout_s = self._running[key.engine, key.model_format], SERVED[key.work], self._plan.timeout_s
        engine.order(timeout_s, op="prepare", num_seqs=work.num_seqs, max_len=work.max_len)
        engine.order(timeout_s, op="generate", **work.warm_up(str(number), self._plan.vocab_size)._asdict())
        quiet = self._quiet()
        orders = work.orders(str(number), self._plan.vocab_size)
        answers = [self._generate(engine, key, order) for order in orders]
        figure = work.figure(orders, [answer["seconds"] for answer in answers])
        self._keep(number, key, figure, quiet, answers)

    def _generate(self, engine: Engine, key: Key, order: Order) -> dict[str, Any]:
        answer = engine.order(self._plan.timeout_s, op="generate", **order._asdict())
        if answer["counts"] != [order.num_tokens] * len(order.prompts):
            raise EngineFailure(f"{key.engine} gave {answer['counts']} tokens instead of {order.num_tokens} each")
        return answer

    def _keep(self, number: int, key: Key, value: float, quiet: Quiet, answers: Sequence[dict[str, Any]]) -> None:
        foreign, foreign_s = foreign_use(answers)
        is_noisy = not quiet.is_quiet or (foreign > self._plan.noisy_above and foreign_s > _NOISY_S)
        first = answers[-1]["first"] if key.work in SERVED else ()
        self._found.add(key, Sample(number, value, foreign, quiet.waited_s, is_noisy, first))
        noise = f"   noisy: others take {max(quiet.foreign, foreign):.0%}" if is_noisy else ""
        self._machine.say(f"  {key.work:8} {key.engine:14} {value:10.2f}{noise}")

    def _quiet(self) -> Quiet:
        quiet = self._machine.wait_until_quiet()
        if self._plan.is_strict and not quiet.is_quiet:
            raise Noisy(f"others take {quiet.foreign:.0%} of the machine, still after {quiet.waited_s:.0f} s of waiting")
        return quiet

    def _end_format(self, number: int, model_format: str) -> None:
        """Peaks, then the end of all processes but of those that take long to start."""
        for process in [process for process in self._running if process[1] == model_format]:
            if self._plan.served and process[0] != LLMD_HTTP:
                peak = self._running[process].peak_bytes()
                self._found.add(Key(model_format, MEMORY, process[0]), Sample(number, peak))
            if process not in self._slow_to_start:
                self._running.pop(process).close()

    def _sit_out(self, model_format: str, work: str) -> None:
        """Peers far behind the best one do not run the work, or one that is more of it, again: it would change nothing."""
        if work == HTTP:
            return
        latest = {name: samples[-1] for name, samples in self._found.of(model_format, work).items()}
        peers = {name: sample.value for name, sample in latest.items() if name not in OURS and not sample.is_noisy}
        for name, value in peers.items():
            key, worst = Key(model_format, work, name), min(better(work, value, other) for other in peers.values())
            if key not in self._out and worst < self._plan.sit_out:
                self._out |= {key, key._replace(work=MORE_OF.get(work, work))}
                also = f" and {MORE_OF[work]}" if work in MORE_OF else ""
                self._note(f"{name} sits out {model_format} {work}{also} from now on: a peer is far better")
