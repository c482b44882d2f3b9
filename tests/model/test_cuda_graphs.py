"""Padding to a ladder of sizes gives the tokens of the plain model; a capture that fails leaves the step's result."""

import contextlib

import pytest
import torch
from model.step_driver import GREEDY, StepDriver, make_runner
from model.tiny_models import make_model, prompts, save_model

from llmd.engine.params import SamplingParams
from llmd.model import cuda_graphs
from llmd.model.cuda_graphs import CudaCapture, ladder
from llmd.model.graphs import capture_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Again:
    """Work that is done again into the same memory."""

    def __init__(self, work, result):
        self._work, self._result = work, result

    def replay(self):
        self._result.copy_(self._work())


class LadderCapture(CudaCapture):
    """CudaCapture whose graphs do their work again."""

    def record(self, work):
        result = work()
        return result, Again(work, result), ""


def drivers(path, capture):
    both = [StepDriver(make_runner(path, enforce_eager=True)) for _ in range(2)]
    both[0].runner._graphs._capture = capture
    return both


def generate(driver, params):
    """Rows that come one after another and leave; all tokens."""
    sequences = [driver.sequence(prompts(length, seed=length)[0], params) for length in (5, 9, 1, 7, 3, 2)]
    for count, sequence in enumerate(sequences):
        driver.step([(sequence, len(sequence.tokens)), *((other, 1) for other in sequences[:count])])
    for count in (6, 6, 5, 3, 1, 2, 6):
        driver.step([(sequence, 1) for sequence in sequences[-count:]])
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=0.8, top_p=0.9, max_tokens=64)], ids=["greedy", "drawn"]
)
def test_padded_steps_give_the_tokens_of_the_plain_model(params, tmp_path):
    recorded, eager = drivers(save_model(make_model("Qwen3"), tmp_path), LadderCapture(CPU))
    assert generate(recorded, params) == generate(eager, params)
    assert {size for size, _ in recorded.runner._graphs._graphs} == {1, 2, 4, 8}


def test_the_ladder():
    assert [ladder(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 64, 65, 256, 257, 288, 289)] == [
        1, 2, 4, 4, 8, 8, 16, 64, 72, 256, 288, 288, 320,
    ]  # fmt: skip
    capture = CudaCapture(CUDA)
    assert capture.size(3, 0) == 4
    assert capture.size(3, 1) is None  # adapters


def test_who_is_captured():
    assert isinstance(capture_for(CUDA), CudaCapture)
    assert capture_for(CUDA, has_states=True) is None
    assert capture_for(torch.device("meta")) is None


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's graphs, in name; what they were told."""
    told = []

    @contextlib.contextmanager
    def graph(which, **options):
        told.append(options)
        yield

    fakes = {"graph": graph, "CUDAGraph": object, "graph_pool_handle": lambda: (7, 0), "memory_reserved": lambda device: 5}
    for name, fake in fakes.items():
        monkeypatch.setattr(cuda_graphs.torch.cuda, name, fake)
    return told


def test_the_first_result_lies_where_replays_will_leave_theirs(graphs):
    results = [torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)]
    capture, queue = CudaCapture(CUDA), iter(results)
    for _ in range(2):
        kept, graph, why_not = capture.record(lambda: next(queue))
        assert graph is not None
        assert why_not == ""
    assert kept is results[3]
    assert [result.tolist() for result in results[1::2]] == [[[1.0, 2.0]], [[3.0, 4.0]]]
    assert graphs == [{"pool": (7, 0), "capture_error_mode": "thread_local"}] * 2  # one pool


def test_what_cannot_be_captured_is_told_and_its_result_kept(graphs):
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
