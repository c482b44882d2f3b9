"""Padding to a ladder of sizes gives the tokens of the plain model; a capture that fails leaves the step's result."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from model.ladder_capture import LadderCapture
from model.made_adapters import make_adapter
from model.step_driver import GREEDY, StepDriver, make_runner, model_parts
from model.tiny_models import make_model, prompts, save_model

from llmd.engine.params import SamplingParams
from llmd.engine.step import StepPlan
from llmd.model import cuda_graphs, graphs
from llmd.model.cuda_graphs import CudaCapture, ladder, sizes_of
from llmd.model.graphs import Key, capture_for
from llmd.model.sampler import SampledTokens, TorchSampler

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class GreedySampler(TorchSampler):
    """Reads nothing of the host in `sample`."""

    def launches(self, host_rows):
        return None if any(not self._params[row].is_greedy for row in host_rows) else "greedy"

    def sample(self, logits, rows, num_tokens, token_ids, *, host_rows=None, max_tokens=None):
        if self.launches(host_rows) is None:
            return super().sample(logits, rows, num_tokens, token_ids, host_rows=host_rows, max_tokens=max_tokens)
        best, tokens = logits.max(1)
        return SampledTokens(tokens, best, tuple(host_rows), None, (), ())


@pytest.fixture
def ladder_capture(monkeypatch):
    monkeypatch.setattr("llmd.model.runner.capture_for", lambda device: LadderCapture(device))


def greedy_parts(**adapters):
    parts = model_parts(**adapters)
    parts.samplers["torch"] = SimpleNamespace(priority=1, build=GreedySampler)
    return parts


def recorded_of(driver):
    return driver.runner._graphs._graphs


def generate(driver, params, slots=()):
    """Rows that come one after another and leave; all tokens."""
    slots = slots or [None] * 6
    sequences = [
        driver.sequence(prompts(length, seed=length)[0], params, slot=slot)
        for length, slot in zip((5, 9, 1, 7, 3, 2), slots, strict=True)
    ]
    for count, sequence in enumerate(sequences):
        driver.step([(sequence, len(sequence.tokens)), *((other, 1) for other in sequences[:count])])
    for count in (6, 6, 5, 3, 1, 2, 6):
        driver.step([(sequence, 1) for sequence in sequences[-count:]])
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=0.8, top_p=0.9, max_tokens=64)], ids=["greedy", "drawn"]
)
@pytest.mark.usefixtures("ladder_capture")
def test_padded_steps_give_the_tokens_of_the_plain_model(params, tmp_path):
    path = save_model(make_model("Qwen3"), tmp_path)
    recorded = StepDriver(make_runner(path, parts=greedy_parts()))
    assert generate(recorded, params) == generate(StepDriver(make_runner(path, enforce_eager=True)), params)
    assert {size for size, _ in recorded_of(recorded)} == {1, 2, 4, 8, 16}
    assert sum(graph.captured.replays for graph in recorded_of(recorded).values()) >= 7
    kinds = {launches for _, launches in recorded.runner._draws._graphs}
    assert kinds == ({"greedy"} if params is GREEDY else set())


@pytest.mark.usefixtures("ladder_capture")
def test_what_was_cached_is_not_touched_by_steps_of_spare_lines(tmp_path):
    driver = StepDriver(make_runner(save_model(make_model("Llama"), tmp_path), scheduler={"max_num_seqs": 40}))
    generate(driver, GREEDY)
    runner = driver.runner
    assert runner.kv.num_blocks == runner.num_blocks + 1
    before = runner.kv.pool[:-1].clone()
    assert runner.lacks_graphs
    while not runner.record_next():
        pass
    assert {size for size, _ in recorded_of(driver)} == set(sizes_of(40)) == {1, 2, 4, 8, 16, 24, 32, 40}
    assert not runner.lacks_graphs
    assert torch.equal(runner.kv.pool[:-1], before)
    assert len(generate(driver, GREEDY)) == 6


@pytest.mark.usefixtures("ladder_capture")
def test_a_size_that_steps_keep_wanting_is_recorded_among_them(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "_PATIENCE", 4)
    driver = StepDriver(make_runner(save_model(make_model("Llama"), tmp_path), scheduler={"max_num_seqs": 32}))
    sequences = [driver.sequence(prompts(2, seed=seed)[0]) for seed in range(20)]
    driver.step([(sequence, 2) for sequence in sequences])
    known = []
    for _ in range(5):
        driver.step([(sequence, 1) for sequence in sequences])
        known.append(Key(24, 0) in recorded_of(driver))
    assert known == [False, False, False, True, True]
    assert recorded_of(driver)[Key(32, 0)].captured.replays == 3
    assert recorded_of(driver)[Key(24, 0)].captured.replays == 1


@pytest.mark.usefixtures("ladder_capture")
def test_adapters_change_what_is_replayed(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "_PATIENCE", 1)
    model = make_model("Qwen2")
    path = save_model(model, tmp_path / "base")
    made = [make_adapter(model, tmp_path / name, seed=index, rank=8).path for index, name in enumerate("ab")]
    tokens = []
    for eager in (False, True):
        driver = StepDriver(
            make_runner(
                path, adapters={"max_loras": 3, "max_lora_rank": 16}, parts=greedy_parts(max_loras=3), enforce_eager=eager
            )
        )
        for slot, adapter in enumerate(made):
            driver.load_adapter(adapter, slot)
        tokens.append(generate(driver, GREEDY, (0, 1, None, 0, None, 1)))
        if not eager:
            assert {key.variant for key in recorded_of(driver)} > {0}
    assert tokens[0] == tokens[1]


@pytest.mark.usefixtures("ladder_capture")
def test_a_graph_that_finds_no_memory_is_tried_again_later(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "_PATIENCE", 1)
    driver = StepDriver(make_runner(save_model(make_model("Llama"), tmp_path), scheduler={"max_num_seqs": 32}))
    sequences = [driver.sequence(prompts(2, seed=seed)[0]) for seed in range(20)]
    driver.step([(sequence, 2) for sequence in sequences])
    record = LadderCapture.record
    monkeypatch.setattr(LadderCapture, "record", lambda self, work: (work(), None, ""))
    for _ in range(3):
        driver.step([(sequence, 1) for sequence in sequences])
    assert sum("no memory is left" in line.message for line in caplog.records) == 1
    assert recorded_of(driver)[Key(32, 0)].captured.replays == 2
    monkeypatch.setattr(LadderCapture, "record", record)
    monkeypatch.setattr(graphs.time, "monotonic", lambda: 1e9)
    driver.step([(sequence, 1) for sequence in sequences])
    assert Key(24, 0) in recorded_of(driver)


def test_the_ladder():
    assert [ladder(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 64, 65, 256, 257, 288, 289)] == [
        1, 2, 4, 4, 8, 8, 16, 64, 72, 256, 288, 288, 320,
    ]  # fmt: skip
    assert sizes_of(20) == (1, 2, 4, 8, 16, 20)
    assert sizes_of(1) == (1,)
    assert len(sizes_of(1024)) == 3 + 32 + 24


def test_who_is_captured():
    assert isinstance(capture_for(CUDA), CudaCapture)
    assert capture_for(torch.device("meta")) is None


def test_what_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr("llmd.model.runner.capture_for", lambda device: LadderCapture(device))
    runner = make_runner(save_model(make_model("Llama"), tmp_path), scheduler={"max_num_seqs": 64})
    chosen = runner._graphs.choose

    def plan(num_rows, count=1, samples=True):
        rows = list(range(num_rows))
        return StepPlan(
            step_id=1,
            rows=rows,
            starts=rows,
            counts=[count] * num_rows,
            num_logits=[1] * num_rows,
            samples=[samples] * num_rows,
        )

    assert chosen(plan(5), 0) == Key(8, 0)
    assert chosen(plan(33), 0) == Key(64, 0)  # 40 is not there yet
    assert chosen(plan(5, count=2), 0) is None
    assert chosen(plan(5, samples=False), 0) is None
    assert chosen(plan(5), 7) is None  # adapters of which nothing is recorded
    assert chosen(plan(5), None) is None


class Stream:
    """Notes who waits for whom."""

    def wait_stream(self, other):
        pass


@pytest.fixture
def told(monkeypatch):
    """torch.cuda's graphs, in name; what they were told."""
    told = []

    class Graph:
        def capture_begin(self, **options):
            told.append(options)

        def capture_end(self):
            told.append("end")

    fakes = {
        "CUDAGraph": Graph, "graph_pool_handle": lambda: (7, 0), "mem_get_info": lambda device: (5, 9),
        "Stream": lambda device: Stream(), "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(cuda_graphs.torch.cuda, name, fake)
    return told


def test_the_first_result_lies_where_replays_will_leave_theirs(told):
    results = [torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)]
    capture, queue = CudaCapture(CUDA), iter(results)
    for _ in range(2):
        kept, graph, why_not = capture.record(lambda: next(queue))
        assert graph is not None
        assert why_not == ""
    assert kept is results[3]
    assert [result.tolist() for result in results[1::2]] == [[[1.0, 2.0]], [[3.0, 4.0]]]
    assert told == [{"pool": (7, 0), "capture_error_mode": "thread_local"}, "end"] * 2  # one pool


def test_what_cannot_be_captured_is_told_and_its_result_kept(told):
    result, calls = torch.ones(2, 3), []

    def work():
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")
        return result

    kept, graph, why_not = CudaCapture(CUDA).record(work)
    assert kept is result
    assert graph is None
    assert why_not == "what a graph cannot hold: operation not permitted when stream is capturing"
    assert told[-1] == "end"
