"""The cases that drive a Runner, walked on a CUDA device that computes nothing: typing errors in what a GPU alone runs."""

import contextlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from model.fake_cuda import fake_cuda

from benchmarks.gpu import ceilings, decode, kernels, small, trace, worker
from benchmarks.gpu.setting import Setting, Work

pytest.importorskip("triton")


@pytest.fixture
def device():
    modes = {"get_sync_debug_mode": mock.Mock(return_value=0), "set_sync_debug_mode": mock.Mock()}
    with fake_cuda() as device, mock.patch.multiple(torch.cuda, **modes):
        yield device
    assert [call.args for call in modes["set_sync_debug_mode"].call_args_list] in ([], [("error",), (0,)])


@pytest.fixture
def setting(tmp_path):
    ceilings = {"copy_gb_s": 1.0, "matmul_tflop_s": 1.0}
    return Setting(torch.device("cuda"), True, "qwen2.5-0.5b", tmp_path, ceilings)


def test_ceilings(device, setting):
    found = {name: work() for name, work in ceilings.cases(setting).items()}
    assert found["host"]["gpu"] == "fake"
    assert found["copy"]["ms"] == found["matmul"]["ms"] == 1.0


def test_decode(device, setting):
    found = {name: work() for name, work in decode.cases(setting).items()}
    assert list(found) == ["start", "decode 1", "decode 3", "decode 1, top_p", "prefill 8k"]
    assert found["decode 3"]["tokens_s"] > 0
    assert "replay" in device.launches


def test_small(device, setting):
    cases = small.cases(setting)
    assert cases["graphs"]() == {"tokens": 40, "same": 1.0}
    assert "replay" in device.launches
    assert cases["no waits"]() == {"waits": 0}


def test_a_wait_is_a_result_and_any_other_error_none(device, setting):
    for words, is_wait in (("called a synchronizing CUDA operation", True), ("illegal address", False)):
        with mock.patch.object(small.Model, "tokens", side_effect=[[], RuntimeError(words)]):
            if is_wait:
                assert small.no_waits(setting) == {"waits": 1, "first": words}
                continue
            with pytest.raises(RuntimeError, match=words):
                small.no_waits(setting)


def test_a_trace(device, setting):
    found = mock.Mock()
    found.export_chrome_trace = lambda file: Path(file).write_text('{"traceEvents": []}')
    with mock.patch.object(trace, "profile") as profile, mock.patch.object(trace, "_NAME", "trace.json"):
        profile.return_value.__enter__.return_value = found
        assert trace.decode(setting)["idle"] is None
    assert len(profile.call_args.kwargs["activities"]) == 2


def test_a_call_that_no_graph_can_hold_ends_the_process_with_what_was_found(device, setting, tmp_path):
    def make(setting, config):
        return Work(lambda: 1, lambda: 2, 8)

    class Graph:
        def __enter__(self):
            raise RuntimeError("operation not permitted\nmore")

        def __exit__(self, *failure):
            raise AssertionError

    real = kernels.median_ms

    def ours_only(*args, **kwargs):
        with mock.patch.object(torch.cuda, "graph", return_value=contextlib.nullcontext() if not calls else Graph()):
            calls.append(1)
            return real(*args, **kwargs)

    for before, key in (([], "figures"), ([1], "error")):
        calls = list(before)
        with (tmp_path / "cases").open("w+") as file, mock.patch.object(kernels, "median_ms", ours_only):
            with pytest.raises(SystemExit, match="a capture failed"):
                worker.run("case", lambda: kernels.measure(setting, {}, make), setting, file)
            file.seek(0)
            line = worker.json.loads(file.readlines()[1])
        assert line[key] in (
            {"ms": 1.0, "gb_s": 0.0, "of_copy": 0.0, "torch": "no graph can hold its way"},
            "no graph can hold it: operation not permitted",
        )


def test_what_a_worker_writes(device, setting, tmp_path):
    def works():
        return {"ms": 1.0}

    def breaks():
        raise torch.cuda.OutOfMemoryError("no room")

    with (tmp_path / "cases").open("w+") as file:
        for work in (works, breaks):
            worker.run(work.__name__, work, setting, file)
        file.seek(0)
        lines = [worker.json.loads(line) for line in file]
    assert lines[1]["figures"] == {"ms": 1.0}
    assert lines[3]["error"] == "out of memory: no room"
