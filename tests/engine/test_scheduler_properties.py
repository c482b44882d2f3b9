"""Thousands of random schedules against a device that checks every KV read."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fakes import FakeDevice, FakeGrammar, expected_tokens, fake_info
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.executor import AdapterFacts, KVGroup
from llmd.engine.grammar import MaskJob
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.scheduler import Scheduler
from llmd.engine.step import FinishReason
from llmd_plugins.scheduling.fcfs import FcfsQueue
from llmd_plugins.scheduling.priority import PriorityQueue

VOCAB = 50
ADAPTERS = ("a", "b", "c", "d")


@dataclass
class Client:
    """What one request received."""

    request: Request
    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    is_aborted: bool = False
    adapter: str | None = None  # the path of the files that its name stood for when it came


class Drive:
    """Scheduler and fake device with up to `depth` steps in flight, driven turn by turn."""

    def __init__(self, info, config: SchedulerConfig, cache: CacheConfig, depth: int) -> None:
        waiting = PriorityQueue(30.0) if config.policy == "priority" else FcfsQueue()
        self.scheduler = Scheduler(config, cache, info, waiting)
        self.device = FakeDevice(info)
        self.depth = depth
        self.in_flight: deque = deque()
        self.clients: dict[str, Client] = {}
        self.reads: deque = deque()  # adapters whose files are being read, and turns until they are there
        self.drops: list[int] = []
        for name in ADAPTERS if info.max_loras else ():
            self.declare(name, f"{name}/0")

    def declare(self, name: str, path: str) -> None:
        adapters = self.scheduler.adapters
        adapters.publish(adapters.make(name, path))

    def add(self, request: Request) -> None:
        client = self.clients[request.request_id] = Client(request)
        if request.adapter is not None:
            client.adapter = self.scheduler.adapters.get(request.adapter).path
        self.scheduler.add(request, seed=request.params.seed or 0)

    def take(self, deltas) -> None:
        for delta in deltas:
            client = self.clients[delta.request_id]
            assert delta.index not in client.reasons, "a delta after the last one"
            client.tokens.setdefault(delta.index, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                client.reasons[delta.index] = delta.finish_reason

    def turn(self) -> bool:
        """Plan, run, commit; False when there was nothing to do."""
        self.read_adapters()
        step = self.scheduler.schedule(0.0)
        if step is not None:
            assert step.plan.num_tokens <= self.scheduler.config.max_num_batched_tokens
            assert len(set(step.plan.rows)) == len(step.plan.rows)
            self.check_copies(step)
            self.in_flight.append([step, None])
        self.run_first()  # a step runs when the one before it is committed: its masks need all tokens before it
        if len(self.in_flight) >= self.depth or (self.in_flight and step is None):
            committed, result = self.in_flight.popleft()
            self.take(self.scheduler.commit(committed, result))
        elif step is None and not self.reads:
            return False
        self.scheduler.check()
        return True

    def check_copies(self, step) -> None:
        """Each is from a sibling that runs into a block of a new row alone, whose first step is one token that samples."""
        running = self.scheduler.running
        holders = [(block_id, entry) for entry in running for table in entry.block_ids for block_id in table]
        for source, target in step.plan.block_copies:
            [new] = [entry for block_id, entry in holders if block_id == target]
            siblings = [entry for block_id, entry in holders if block_id == source and entry.request is new.request]
            assert any(entry is not new and entry.num_output_tokens > 0 for entry in siblings)
            place = step.plan.rows.index(new.row)
            assert new.row in {admit.row for admit in step.plan.admitted}
            assert (step.plan.counts[place], step.plan.samples[place]) == (1, True)
            assert step.plan.starts[place] == new.num_prompt_tokens - 1

    def read_adapters(self) -> None:
        """The executor's part: files take two turns to read; what is dropped stays until the steps in flight have run."""
        adapters = self.scheduler.adapters
        if self.reads and self.reads[0][1] == 0:
            entry, _ = self.reads.popleft()
            self.device.adapters[entry.adapter_id] = entry.path
            self.drops = [adapter_id for adapter_id in self.drops if adapter_id != entry.adapter_id]
            adapters.loaded(entry, AdapterFacts(8, 1000))
        self.reads = deque((entry, max(0, turns - 1)) for entry, turns in self.reads)
        self.reads.extend((entry, 2) for entry in adapters.take_reads())
        self.drops += adapters.take_drops()
        if not self.in_flight:
            for adapter_id in self.drops:
                del self.device.adapters[adapter_id]
            self.drops = []

    def run_first(self) -> None:
        """Let the device compute the oldest step, unless it has."""
        if self.in_flight and self.in_flight[0][1] is None:
            step = self.in_flight[0][0]
            masks = MaskJob(self.scheduler.info.vocab_size)
            sequences = [step.sequences[index] for index in step.plan.masked]
            masks.fill([None if entry.is_finished or entry.num_stale else entry.matcher for entry in sequences])
            assert not masks.errors
            self.in_flight[0][1] = self.device.run(step.plan, masks.bitmask.result())

    def finish(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.turn():
                break
        assert not self.scheduler.requests, "a request never ended"
        pool = self.scheduler.kv_cache.pool
        assert pool.num_free == pool.num_blocks
        assert self.scheduler.num_admitted == self.scheduler.num_finished
        self.read_adapters()
        assert self.scheduler.adapters.is_balanced
        held = {entry.adapter_id for entry in self.scheduler.adapters._entries.values() if entry.is_on_host}
        assert set(self.device.adapters) == held


@st.composite
def requests(draw, index: int, adapters: bool = False) -> Request:
    # few distinct prompts with common beginnings, so that prefix hits are frequent
    base = draw(st.integers(0, 2))
    length = draw(st.integers(1, 40))
    token_ids = tuple((base * 7 + position) % VOCAB for position in range(length))
    params = SamplingParams(
        temperature=1.0,
        seed=draw(st.integers(0, 2)),
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        max_tokens=draw(st.integers(1, 20)),
        min_tokens=0,
        stop_token_ids=draw(st.sampled_from([(), (), (3, 9)])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
    )
    namespace = draw(st.sampled_from([b"", b"", b"other"]))
    return Request(
        request_id=f"r{index}",
        prompt=Prompt(token_ids),
        params=params,
        grammar=draw(st.sampled_from([None, None, FakeGrammar(VOCAB, 1), FakeGrammar(VOCAB, 2)])),
        adapter=draw(st.sampled_from([None, *ADAPTERS])) if adapters else None,
        namespace=namespace,
        priority=draw(st.integers(-2, 2)),
        arrival_s=float(index),
    )


@st.composite
def worlds(draw):
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    groups = tuple(KVGroup(name=f"g{index}") for index in range(draw(st.sampled_from([1, 1, 1, 2]))))
    per_sequence = -(-64 // block_size) * len(groups)
    if draw(st.sampled_from([False, False, True])):
        groups += (KVGroup(name="state", kind="state"),)
    info = fake_info(
        num_blocks=per_sequence + draw(st.integers(0, per_sequence)),
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 6)),
        max_model_len=64,
        vocab_size=VOCAB,
        kv_groups=groups,
        max_loras=draw(st.sampled_from([0, 0, 1, 2, 3])),
        max_cpu_loras=draw(st.integers(1, 4)),
    )
    config = SchedulerConfig(
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_seqs + draw(st.integers(0, 40)),
        watermark=draw(st.sampled_from([0.0, 0.1])),
        adapter_drain_threshold=draw(st.sampled_from([1, 2, 16])),
    )
    cache = CacheConfig(block_size=block_size, enable_prefix_caching=draw(st.booleans()))
    return info, config, cache, draw(st.integers(1, 3))


def check_outputs(client: Client) -> None:
    """What every client must have received, whatever the schedule."""
    request = client.request
    params = request.params
    for index in range(params.n):
        matcher = request.grammar.matcher() if request.grammar else None
        prompt, seed = list(request.prompt.token_ids), params.seed + index
        full = expected_tokens(prompt, params.max_tokens, VOCAB, seed, matcher, client.adapter)
        stop = next((i for i, token in enumerate(full) if token in params.stop_token_ids), None)
        expected = full if stop is None else full[: stop + 1]
        got = client.tokens.get(index, [])
        if client.is_aborted:
            assert got == expected[: len(got)]
            continue
        assert got == expected
        is_length = stop is None and len(full) == params.max_tokens and not (matcher and matcher.finished)
        assert client.reasons[index] in ({FinishReason.LENGTH} if is_length else {FinishReason.STOP, FinishReason.LENGTH})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(world=worlds(), data=st.data())
def test_any_schedule_gives_the_same_tokens_and_loses_nothing(world, data):
    drive = Drive(*world)
    has_adapters = drive.scheduler.adapters.is_enabled
    for index in range(data.draw(st.integers(1, 10))):
        drive.add(data.draw(requests(index, has_adapters)))
        if has_adapters and data.draw(st.integers(0, 4)) == 0:
            drive.declare(data.draw(st.sampled_from(ADAPTERS)), f"again/{index}")
        for _ in range(data.draw(st.integers(0, 6))):
            drive.turn()
        if data.draw(st.integers(0, 5)) == 0:
            victim = data.draw(st.sampled_from(sorted(drive.clients)))
            if victim in drive.scheduler.requests:
                drive.clients[victim].is_aborted = True
                drive.scheduler.end_request(victim, FinishReason.ABORT)
                drive.scheduler.check()
    drive.finish()
    for client in drive.clients.values():
        check_outputs(client)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(world=worlds(), data=st.data())
def test_a_failing_row_ends_alone(world, data):
    drive = Drive(*world)
    for index in range(data.draw(st.integers(2, 6))):
        drive.add(data.draw(requests(index)))
    drive.device.failing_requests = {"r0"}
    drive.finish()
    for request_id, client in drive.clients.items():
        if request_id == "r0":
            assert set(client.reasons.values()) == {FinishReason.ERROR}
        else:
            check_outputs(client)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(world=worlds(), data=st.data())
def test_a_failing_step_ends_its_own_sequences_only(world, data):
    drive = Drive(*world)
    for index in range(data.draw(st.integers(2, 6))):
        drive.add(data.draw(requests(index)))
    for _ in range(data.draw(st.integers(0, 5))):
        drive.turn()
    step = drive.scheduler.schedule(0.0)
    hit = set()
    if step is not None:
        hit = {sequence.request.request_id for sequence in step.sequences}
        while drive.in_flight:
            drive.run_first()
            committed, result = drive.in_flight.popleft()
            drive.take(drive.scheduler.commit(committed, result))
        drive.device.fail(step.plan)
        drive.take(drive.scheduler.fail(step, "boom"))
        drive.scheduler.check()
    drive.finish()
    for request_id, client in drive.clients.items():
        if request_id not in hit:
            check_outputs(client)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(world=worlds(), data=st.data())
def test_steps_without_memory_are_computed_again(world, data):
    drive = Drive(*world)
    has_adapters = drive.scheduler.adapters.is_enabled
    for index in range(data.draw(st.integers(1, 6))):
        drive.add(data.draw(requests(index, has_adapters)))
        for _ in range(data.draw(st.integers(0, 6))):
            drive.turn()
        if data.draw(st.booleans()):
            for step, result in drive.in_flight:
                if result is None:
                    drive.device.fail(step.plan)
            drive.scheduler.roll_back([step for step, _ in drive.in_flight])
            drive.in_flight.clear()
            drive.scheduler.token_budget = max(1, drive.scheduler.token_budget // 2)
            drive.scheduler.check()
    drive.finish()
    for client in drive.clients.values():
        check_outputs(client)


def test_the_pool_preempts_and_the_oldest_ends_first():
    info = fake_info(num_blocks=20, block_size=4, max_num_seqs=4, max_model_len=64, vocab_size=VOCAB)
    drive = Drive(
        info, SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, watermark=0), CacheConfig(block_size=4), 2
    )
    for index in range(4):
        params = SamplingParams(max_tokens=30, seed=index)
        drive.add(Request(request_id=f"r{index}", prompt=Prompt(tuple(range(index, index + 9))), params=params))
    ended: list[str] = []
    while drive.turn():
        ended += [name for name, client in drive.clients.items() if client.reasons and name not in ended]
    assert ended == ["r0", "r1", "r2", "r3"]
    assert drive.scheduler.num_preemptions > 0
    for client in drive.clients.values():
        check_outputs(client)


def test_siblings_share_the_prompt_they_have_in_common():
    info = fake_info(num_blocks=64, block_size=4, max_num_seqs=8, max_model_len=64, vocab_size=VOCAB)
    for enable in (True, False):
        drive = Drive(info, SchedulerConfig(max_num_seqs=8), CacheConfig(block_size=4, enable_prefix_caching=enable), 2)
        drive.add(Request(request_id="r", prompt=Prompt(tuple(range(33))), params=SamplingParams(n=4, max_tokens=2, seed=1)))
        drive.finish()
        check_outputs(drive.clients["r"])
        assert drive.device.num_computed == 33 + 3 * (33 - 32) + 4 * 1


def test_without_prefix_caching_requests_share_nothing():
    info = fake_info(vocab_size=VOCAB)
    drive = Drive(info, SchedulerConfig(max_num_seqs=8), CacheConfig(block_size=4, enable_prefix_caching=False), 1)
    for index in range(2):
        drive.add(
            Request(request_id=f"r{index}", prompt=Prompt(tuple(range(32))), params=SamplingParams(max_tokens=1, seed=0))
        )
        drive.finish()
    assert drive.device.num_computed == 64


def test_namespaces_and_adapters_do_not_meet():
    info = fake_info(vocab_size=VOCAB, max_loras=2, max_cpu_loras=2)
    drive = Drive(info, SchedulerConfig(max_num_seqs=8), CacheConfig(block_size=4), 1)
    prompt = Prompt(tuple(range(32)))
    params = SamplingParams(max_tokens=1, seed=0)
    for index, (namespace, adapter) in enumerate([(b"", None), (b"a", None), (b"", "a"), (b"", None)]):
        drive.add(Request(request_id=f"r{index}", prompt=prompt, params=params, namespace=namespace, adapter=adapter))
        drive.finish()
    assert drive.device.num_computed == 3 * 32 + (32 - 28)
