"""The cases that drive the engine, on a CPU in small, and what is made of traces and of pytest's words."""

import gzip
import json
import subprocess
import sys
from unittest import mock

import pytest
import torch

from benchmarks.gpu import device_tests, loop, serve, start, trace
from benchmarks.gpu.host import ROOT
from benchmarks.gpu.setting import Setting


@pytest.fixture
def setting(tmp_path):
    return Setting(torch.device("cpu"), True, "qwen2.5-0.5b", tmp_path, {})


def test_requests(setting):
    found = serve.requests(setting)
    assert found["output_tokens"] > 0 < found["output_tokens_s"]


def test_steps_of_the_engine(setting):
    found = loop.steady(setting, 64)
    assert found["steps"] >= 10
    assert found["cpu_ms"] == pytest.approx(found["loop_ms"] + found["executor_ms"], abs=0.01)
    assert found["loop_ms"] > 0 < found["executor_ms"]


def test_waits_for_events_are_no_work(monkeypatch):
    class Event:
        def synchronize(self):
            sum(range(300_000))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = loop.Waiting()
    with waiting.counted():
        Event().synchronize()
    counted = waiting.cpu_s
    Event().synchronize()
    assert waiting.cpu_s == counted > 0


def test_steps_that_never_come_are_told(setting, monkeypatch):
    monkeypatch.setattr(loop, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(loop, "_read", lambda llm, waiting: loop.Reading(0.0, 3, {}, 0.0))
    with pytest.raises(TimeoutError, match="3 of 9 steps in 0 s"):
        loop._after(None, None, 9)


def test_start(setting):
    found = start.cases(setting)["again"]()
    assert found["ready_s"] >= found["first_word_s"] > 0
    assert list(start.cases(setting)) == ["first", "again"]
    assert list(start.cases(setting._replace(model="qwen2.5-7b"))) == ["again"]


def test_a_daemon_that_ends_before_is_an_error(setting, monkeypatch):
    monkeypatch.setattr(start, "write_model", lambda folder, model, *, is_tiny: None)
    with pytest.raises(RuntimeError, match="exit code 78"):
        start.start(setting, None)


def test_a_trace_of_decode_steps(setting):
    (work,) = trace.cases(setting).values()
    assert work() == {"steps": 6, "file": "trace.json.gz", "launches": 6, "waits": 0, "first": None}
    events = json.loads(gzip.decompress((setting.folder / "kept" / "trace.json.gz").read_bytes()))["traceEvents"]
    assert len(events) > 100


def kernel(start_us, end_us, correlation, kind="kernel", name="k"):
    return {"cat": kind, "name": name, "ts": start_us, "dur": end_us - start_us, "args": {"correlation": correlation}}


def test_what_a_trace_says_of_the_device():
    events = [
        kernel(10, 20, 1),
        kernel(15, 30, 1),
        kernel(35, 40, 1),  # 5 within a launch
        kernel(50, 60, 2),  # 10 between two
        kernel(41, 42, 3, "gpu_memcpy", "Memcpy HtoD (Pinned -> Device)"),
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 5},
    ]
    assert trace.device_use(events) == {"idle": 0.3, "idle_between": 0.2, "kernels": 4}
    assert trace.device_use([])["idle"] is None


def test_what_a_trace_says_of_waits():
    def call(name, at, kind="cuda_runtime"):
        return {"cat": kind, "name": name, "ts": at, "dur": 1}

    launch = {"cat": "user_annotation", "name": trace._LAUNCH, "ts": 10, "dur": 10}
    inside = [call(name, 12) for name in ("cudaMemcpyAsync", "cudaEventSynchronize", "cudaLaunchKernel")]
    outside = [call("cudaDeviceSynchronize", at) for at in (5, 25)]
    assert trace.waits([launch, *inside, *outside]) == {"launches": 1, "waits": 0, "first": None}
    waits = [call("cudaStreamSynchronize", 13), call("cuStreamSynchronize", 14, "cuda_driver"), call("hipMemcpy", 15)]
    assert trace.waits([launch, *waits])["waits"] == 3
    assert trace.waits([launch, *waits])["first"] == "cudaStreamSynchronize"


def test_the_engine_is_profiled_while_it_runs(setting, monkeypatch):
    def export(file):
        content = json.dumps(
            {"traceEvents": [{"ph": "X", **kernel(0, 5, 1)}, {"ph": "X", **kernel(10, 20, 2)}, {"ph": "M"}]}
        )
        with gzip.open(file, "wt") as trace_file:
            trace_file.write(content)

    profile = mock.MagicMock()
    profile.return_value.__enter__.return_value.export_chrome_trace = export
    monkeypatch.setattr(loop, "profile", profile)
    on_gpu = setting._replace(device=torch.device("cuda"))
    assert loop._profiled(on_gpu, 0.0) == {}
    assert loop._profiled(on_gpu, 0.01) == {"idle": 0.25, "idle_between": 0.25, "kernels": 2}
    assert profile.call_args.kwargs == {"activities": [torch.profiler.ProfilerActivity.CUDA]}
    assert (setting.folder / "kept" / "engine-trace.json.gz").exists()


PYTEST = """
[gw1] [ 10%] PASSED tests/gpu/test_kernels.py::test_a[cuda-x]
[gw1] [ 15%] PASSED tests/gpu/test_kernels.py::test_a[cuda-x: of all]
[gw0] [ 20%] FAILED tests/gpu/test_kernels.py::test_b[cuda]
[gw0] [ 30%] SKIPPED tests/gpu/test_kernels.py::test_c
tests/gpu/test_steps.py::test_d PASSED    [ 40%]
tests/gpu/test_steps.py::test_e ERROR     [ 50%]
tests/gpu/test_steps.py::test_f[cuda-80, all else] PASSED     [ 60%]
ERROR tests/gpu/test_more.py - ModuleNotFoundError: no
FAILED tests/gpu/test_kernels.py::test_b[cuda] - AssertionError
"""


def test_what_pytest_says():
    assert list(device_tests.outcome_of_each(PYTEST).values()) == [
        "PASSED", "PASSED", "FAILED", "SKIPPED", "PASSED", "ERROR", "PASSED", "ERROR",
    ]  # fmt: skip


def test_the_tests_of_a_device(setting, tmp_path, monkeypatch):
    file = ROOT / "tests" / "benchmarks" / "gpu" / "test_cases.py"
    assert {path.name for path in device_tests.marked()} >= {"test_kernels.py", "test_models.py", "test_steps.py"}
    monkeypatch.setattr(device_tests, "command", lambda files, *, is_gpu: [sys.executable, "-c", f"print({PYTEST!r})"])
    found = device_tests.run(setting, [file])
    assert found == {"passed": 4, "failed": 3, "skipped": 1, "unfinished": 0, "s": found["s"], "first": found["first"]}
    assert found["first"] == "test_kernels.py::test_b[cuda]; test_steps.py::test_e; test_more.py"
    assert (setting.folder / "kept" / "tests.log").read_text().count("PASSED") == 4


def test_tests_that_cannot_be_collected_are_an_error_and_those_that_hang_are_ended(setting, monkeypatch):
    monkeypatch.setattr(device_tests, "command", lambda files, *, is_gpu: [sys.executable, "-c", "print('no module')"])
    with pytest.raises(RuntimeError, match="no test was run: no module"):
        device_tests.run(setting, [])
    program = "print('tests/a.py::test_a PASSED', flush=True); import time; time.sleep(60)"
    monkeypatch.setattr(device_tests, "command", lambda files, *, is_gpu: [sys.executable, "-c", program])
    monkeypatch.setattr(device_tests, "_LIMIT_S", 1.0)
    found = device_tests.run(setting, [])
    assert (found["passed"], found["unfinished"]) == (1, 1)


def test_pytest_takes_the_command():
    files = [ROOT / "tests" / "gpu" / "test_steps.py"]
    done = subprocess.run(
        [*device_tests.command(files, is_gpu=False), "--collect-only", "-q"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"-m", "gpu"} <= set(device_tests.command(files, is_gpu=True))
