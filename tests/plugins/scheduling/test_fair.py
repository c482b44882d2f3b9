"""Shares between keys: order, counters, claims, and a device whose clock is reckoned, under a flood."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from fakes import fake_info, greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.params import SamplingParams
from llmd.engine.queue import FairQueue as FairQueueProtocol
from llmd.engine.queue import Load, Share
from llmd.engine.request import Prompt, Request
from llmd.engine.scheduler import Scheduler
from llmd.engine.sequence import Sequence
from llmd.engine.step import StepResult
from llmd_plugins.scheduling import fair
from llmd_plugins.scheduling.fair import FairQueue


def sequence(seq_id: int, key: str = "", *, level: int = 0, arrival_s: float = 0.0, length: int = 4) -> Sequence:
    request = Request(
        request_id=str(seq_id),
        prompt=Prompt((1,) * length),
        params=SamplingParams(),
        key=key,
        priority=level,
        arrival_s=arrival_s,
    )
    return Sequence(request, 0, seq_id, 0, 4096)


def order(queue, now_s: float = 0.0) -> list[int]:
    return [entry.seq_id for entry in queue.ordered(now_s)]


def queue_of(*sequences: Sequence, **shares: Share) -> FairQueue:
    queue = FairQueue(30.0)
    queue.set_shares(shares)
    for entry in sequences:
        queue.push(entry)
    return queue


# --- the queue


def test_it_is_a_fair_queue_and_the_default():
    [spec] = fair.llmd_register_scheduling_policies()
    assert spec.name == SchedulerConfig().policy == "fair"
    assert isinstance(spec.build(SchedulerConfig()), FairQueueProtocol)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(-3, 3), st.booleans())))
def test_what_is_pushed_and_not_removed_is_there_once(steps):
    queue, inside = FairQueue(30.0), {}
    for seq_id, key, level, is_front in steps:
        if seq_id in inside:
            queue.remove(inside.pop(seq_id))
        else:
            inside[seq_id] = sequence(seq_id, str(key), level=level, arrival_s=float(seq_id))
            (queue.push_front if is_front else queue.push)(inside[seq_id])
        assert sorted(order(queue)) == sorted(inside)
        assert len(queue) == len(inside)
        keys = Counter(entry.request.key for entry in inside.values())
        assert all(queue.load(str(key)) == Load(keys[str(key)], 4 * keys[str(key)]) for key in range(3))


def test_keys_take_turns_by_tokens():
    queue = queue_of(*(sequence(i, "a", length=4) for i in range(4)), *(sequence(10 + i, "b", length=8) for i in range(2)))
    assert order(queue) == [0, 10, 1, 2, 11, 3]


def test_a_weight_is_a_share():
    first = [sequence(i, "a") for i in range(6)]
    queue = queue_of(*first, *(sequence(10 + i, "b") for i in range(3)), a=Share(weight=2.0))
    assert Counter(i < 10 for i in order(queue)[:6]) == {True: 4, False: 2}


def test_within_a_key_priority_and_age_count():
    queue = queue_of(sequence(1, level=1), sequence(2, arrival_s=5.0), sequence(3, arrival_s=40.0))
    assert order(queue) == [2, 1, 3]


def test_a_key_of_lower_priority_number_goes_first_until_another_has_waited_long():
    old, new = sequence(1, "batch", arrival_s=0.0), sequence(2, "web", arrival_s=100.0)
    queue = queue_of(old, new, batch=Share(priority=2))
    assert order(queue, 50.0) == [2, 1]  # not yet two levels of 30 s
    queue.charge([new], 1, [])
    assert order(queue, 100.0) == [1, 2]  # level by now, and it has had less


def test_aging_never_lets_a_flood_pass_those_of_its_own_priority():
    flood = [sequence(i, "flood", arrival_s=0.0) for i in range(3)]
    queue = queue_of(*flood)
    queue.charge(flood, 3, [])
    late = sequence(9, "web", arrival_s=1000.0)
    queue.push(late)
    queue.charge(flood, 3, [])
    assert order(queue, 1000.0)[0] == 9


def test_idleness_is_no_credit():
    busy = [sequence(i, "busy") for i in range(2)]
    gone = sequence(5, "new")
    queue = queue_of(*busy, gone)
    queue.remove(gone)
    queue.charge(busy, 2, [])
    queue.charge(busy, 2, [])
    queue.push(sequence(6, "new"))
    assert queue.rank(sequence(6, "new")) == queue.rank(busy[0]) == (0, 2 * 2 * fair.OUTPUT_WEIGHT)


def test_with_nobody_waiting_a_key_starts_where_the_last_one_left():
    last, other = sequence(1, "a"), sequence(9, "other")
    queue = queue_of(last, other)
    queue.remove(other)
    queue.remove(last)
    queue.charge([last], 0, [100])
    queue.push(sequence(2, "b"))
    assert queue.rank(sequence(2, "b")) == (0, 100.0)


def test_what_is_computed_again_after_a_preemption_is_free():
    again = sequence(1, "a")
    queue = queue_of(again, sequence(2, "b"))
    again.num_preemptions = 1
    queue.charge([again], 0, [100])
    assert queue.rank(again) == (0, 0.0)


def test_accounts_of_keys_that_left_are_forgotten(monkeypatch):
    monkeypatch.setattr(fair, "_MAX_IDLE", 4)
    queue = FairQueue(30.0)
    for index in range(100):
        entry = sequence(index, f"key-{index}")
        queue.push(entry)
        queue.remove(entry)
    assert len(queue._accounts) <= 5


# --- claims and victims


def test_a_single_key_claims_nothing():
    queue = queue_of(sequence(1, "a"))
    queue.charge([sequence(0, "a")], 1, [])
    assert queue.claims(8) == []


def test_a_key_below_its_share_claims_a_row_of_the_one_above():
    running = [sequence(i, "flood") for i in range(4)]
    claim = sequence(9, "web")
    queue = queue_of(sequence(5, "flood"))
    queue.charge(running, 4, [])
    queue.push(claim)
    queue.charge(running, 4, [])
    assert queue.claims(4) == [claim]
    assert queue.victim(claim, running, lambda entry: 1, 4) is running[-1]
    assert queue.victim(claim, running[:2], lambda entry: 1, 4) is None  # two of four rows are its share


def test_two_keys_do_not_take_one_row_from_each_other():
    running, claim = [sequence(1, "a")], sequence(2, "b")
    queue = queue_of(sequence(3, "a"), claim)
    queue.charge(running, 1, [])
    assert queue.victim(claim, running, lambda entry: 1, 1) is None


def test_who_has_had_more_claims_nothing():
    web, flood = sequence(1, "web"), sequence(2, "flood")
    queue = queue_of(sequence(3, "web"), sequence(4, "flood"))
    queue.charge([web, flood], 0, [1000, 10])
    assert [entry.request.key for entry in queue.claims(64)] == ["flood"]


# --- a device with a reckoned clock


@dataclass
class Timed:
    """A request's times."""

    key: str
    arrival_s: float
    first_s: float | None = None
    ended_s: float | None = None


@dataclass
class Simulation:
    """Scheduler and fake device, two steps in flight; a step takes time by its rows and tokens."""

    config: SchedulerConfig
    num_blocks: int = 4096
    shares: dict[str, Share] = field(default_factory=dict)
    is_slow: bool = False
    step_s: float = 0.005
    token_s: float = 20e-6
    now_s: float = 0.0

    def __post_init__(self) -> None:
        info = fake_info(
            num_blocks=self.num_blocks, max_num_seqs=self.config.max_num_seqs, max_model_len=2048, vocab_size=4096
        )
        policies = {"fair": FairQueue(self.config.priority_aging_s)}
        if self.config.policy == "fcfs":
            from llmd_plugins.scheduling.fcfs import FcfsQueue

            policies["fcfs"] = FcfsQueue()
        queue = policies[self.config.policy]
        self.scheduler = Scheduler(self.config, CacheConfig(), info, queue)
        self.scheduler.has_slow_steps = self.is_slow
        if isinstance(queue, FairQueue):
            queue.set_shares(self.shares)
        self.queue = queue
        self.timed: dict[str, Timed] = {}
        self.arrivals: deque = deque()
        self.served: Counter = Counter()
        self.steps: list = []

    def later(self, at_s: float, key: str, *, length: int, max_tokens: int) -> None:
        """A request that comes at a time; in the order of time."""
        request_id = f"{key}-{len(self.arrivals)}-{at_s}"
        number = len(self.arrivals)  # first, so that no two prompts have a prefix in common
        ids = (number, *range(1, length))
        request = Request(
            request_id=request_id, prompt=Prompt(ids), params=greedy(max_tokens=max_tokens), key=key, arrival_s=at_s
        )
        self.timed[request_id] = Timed(key, at_s)
        self.arrivals.append(request)

    def run(self, until_s: float) -> None:
        """Let time pass; the device finishes its steps one after the other."""
        self.arrivals = deque(sorted(self.arrivals, key=lambda request: request.arrival_s))
        in_flight: deque = deque()
        device_free_s = self.now_s
        while self.now_s < until_s:
            while self.arrivals and self.arrivals[0].arrival_s <= self.now_s:
                self.scheduler.add(self.arrivals.popleft(), seed=0)
            step = self.scheduler.schedule(self.now_s) if len(in_flight) < 2 else None
            if step is not None:
                device_free_s = max(device_free_s, self.now_s) + self.step_s + self.token_s * step.plan.num_tokens
                result = StepResult(step_id=step.plan.step_id, token_ids=[7] * sum(step.plan.samples))
                self.steps.append(step)
                in_flight.append((step, result, device_free_s))
                continue
            if in_flight:
                step, result, done_s = in_flight.popleft()
                self.now_s = max(self.now_s, done_s)
                self._take(self.scheduler.commit(step, result))
            elif self.arrivals:
                self.now_s = max(self.now_s, self.arrivals[0].arrival_s)
            else:
                return

    def _take(self, deltas) -> None:
        for delta in deltas:
            timed = self.timed[delta.request_id]
            self.served[timed.key] += len(delta.token_ids)
            if delta.token_ids and timed.first_s is None:
                timed.first_s = self.now_s
            if delta.finish_reason is not None:
                timed.ended_s = self.now_s

    def ttfts(self, key: str) -> list[float]:
        return sorted((t.first_s or 1e9) - t.arrival_s for t in self.timed.values() if t.key == key)


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def light_ttft(policy: str, *, is_flooded: bool, num_blocks: int = 4096, flood_prompt: int = 200) -> float:
    """The p95 of the TTFT of a key that sends one request a second, with or without 500 requests of another."""
    config = SchedulerConfig(policy=policy, max_num_seqs=64)
    simulation = Simulation(config, num_blocks=num_blocks)
    if is_flooded:
        for _ in range(500):
            simulation.later(0.0, "flood", length=flood_prompt, max_tokens=300)
    for second in range(20):
        simulation.later(0.5 + second * 1.013, "light", length=500, max_tokens=20)
    simulation.run(22.0)
    simulation.scheduler.check()
    if is_flooded:
        assert simulation.scheduler.requests, "the flood ended too soon to say anything"
    return percentile(simulation.ttfts("light"), 0.95)


def test_a_flood_leaves_the_other_keys_first_token_within_three_times_its_idle_value():
    idle = light_ttft("fair", is_flooded=False)
    assert light_ttft("fair", is_flooded=True) <= 3 * idle
    assert light_ttft("fcfs", is_flooded=True) > 100 * idle  # what it is without


def test_a_flood_of_long_prompts_and_of_all_blocks_gives_way_too():
    idle = light_ttft("fair", is_flooded=False, num_blocks=1200)
    assert light_ttft("fair", is_flooded=True, num_blocks=1200, flood_prompt=1500) <= 3 * idle


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_service_of_two_floods_is_proportional_to_their_weights(weight):
    config = SchedulerConfig(policy="fair", max_num_seqs=16, max_num_batched_tokens=256)
    simulation = Simulation(config, shares={"a": Share(weight)})
    for _ in range(400):
        simulation.later(0.0, "a", length=20, max_tokens=20)
        simulation.later(0.0, "b", length=20, max_tokens=20)
    simulation.run(3.0)
    assert min(simulation.queue.load(key).num_sequences for key in "ab") > 0
    assert simulation.served["a"] / simulation.served["b"] == pytest.approx(weight, rel=0.15)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.integers(1, 30), st.floats(0, 0.5)),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 6),
    st.sampled_from([0.5, 1.0, 4.0]),
    st.integers(-2, 2),
    st.booleans(),
)
def test_every_request_ends_and_counters_stay_together(requests, max_num_seqs, weight, priority, is_slow):
    config = SchedulerConfig(policy="fair", max_num_seqs=max_num_seqs, max_num_batched_tokens=64, priority_aging_s=0.1)
    simulation = Simulation(config, num_blocks=140, shares={"a": Share(weight, priority)}, is_slow=is_slow)
    for key, length, max_tokens, at_s in requests:
        simulation.later(at_s, key, length=length, max_tokens=max_tokens)
    simulation.run(1e6)
    simulation.scheduler.check()
    assert all(timed.ended_s is not None for timed in simulation.timed.values())
    accounts = simulation.queue._accounts.values()
    most = sum((length + 2 * count) / min(weight, 1.0) for _, length, count, _ in requests)
    assert all(0 <= account.served <= most for account in accounts)
    assert all(account.num_tokens == 0 and not account.entries for account in accounts)


_BACKLOG = {key: [sequence(100 * key + i, str(key), length=10) for i in range(90)] for key in range(3)}


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=25))
def test_backlogged_keys_stay_within_a_batch_of_each_other(sizes):
    """The bound of the paper: with both backlogged, the difference is at most the largest admission and step."""
    queue = FairQueue(30.0)
    for waiting in _BACKLOG.values():
        for entry in waiting:
            queue.push(entry)
    for size in sizes:
        running = []
        for entry in queue.ordered(0.0):
            queue.remove(entry)
            running.append(entry)
            if len(running) == size:
                break
        queue.charge(running, 0, [10] * size)
        standings = [queue.rank(waiting[0])[1] for waiting in _BACKLOG.values()]
        assert max(standings) - min(standings) <= 10


def test_on_a_slow_device_claims_have_every_other_step_at_most():
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256)
    simulation = Simulation(config, is_slow=True, step_s=0.0, token_s=1e-3)
    for _ in range(20):
        simulation.later(0.0, "flood", length=20, max_tokens=200)
    for index in range(400):
        simulation.later(0.5 + index * 0.01, f"light-{index % 40}", length=20, max_tokens=2)
    simulation.run(4.0)
    alone = [step for step in simulation.steps if step.num_decodes == 0]
    assert alone
    running = [step for step in simulation.steps if step.plan.step_id > alone[0].plan.step_id]
    assert all(one.num_decodes or other.num_decodes for one, other in pairwise(running))
    assert simulation.served["flood"] > 0
