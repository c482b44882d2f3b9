"""An engine's process: the protocol, and engines that die, hang, spin, print and refuse."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.cpu.machine import group_cpu_s, group_peak_bytes
from benchmarks.cpu.process import Command, EngineFailure, EngineProcess

ADAPTER = """
import os, subprocess, sys, threading, time
from . import Generated

class Engine:
    def __init__(self, model, options):
        if model == "absent":
            raise FileNotFoundError("no model here")
        if model == "spinning":
            threading.Thread(target=self.spin, daemon=True).start()
        if model == "with a child":
            self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.model, self.width = model, options["width"]
    def spin(self):
        while True:
            pass
    def facts(self):
        return {"version": "1", "child": self.child.pid if self.model == "with a child" else None}
    def prepare(self, num_seqs, max_len):
        self.width = num_seqs * max_len
    def generate(self, prompts, num_tokens):
        if self.model == "dying":
            print("out of luck", file=sys.stderr)
            sys.stderr.flush()
            os._exit(3)
        if self.model == "hanging":
            time.sleep(600)
        if self.model == "printing":
            print('{"seconds": 0}', flush=True)
        return Generated.of([[prompt[0] + self.width] * num_tokens for prompt in prompts])
    def close(self):
        print("closed", file=sys.stderr)
"""


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(adapter=ADAPTER):
        (tmp_path / "fake.py").write_text(adapter)
        command = Command(sys.executable, str(tmp_path / "fake.py"), {"OMP_NUM_THREADS": "1"})
        started.append(EngineProcess("fake", command, tmp_path / "log"))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def load(process, model="good"):
    return process.order(30, op="load", model=model, options={"width": 7})


def generate(process, timeout_s=30):
    return process.order(timeout_s, op="generate", prompts=[[1, 2], [5]], num_tokens=3)


def is_alive(pid):
    """A zombie waits for somebody to ask for its exit code."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_orders_and_answers(launch, tmp_path):
    process = launch()
    loaded = load(process)
    assert loaded["facts"]["version"] == "1"
    answer = generate(process)
    assert (answer["counts"], answer["first"]) == ([3, 3], [8, 12])
    assert 0 <= answer["seconds"] < 10
    assert 0 <= answer["foreign"] <= 1
    process.order(30, op="prepare", num_seqs=2, max_len=50)
    assert generate(process)["first"] == [101, 105]
    assert process.peak_bytes() > 1 << 20
    process.close()
    assert (tmp_path / "log").read_text() == "closed\n"
    process.close()  # and once more does nothing


def test_what_an_engine_prints_is_no_answer(launch, tmp_path):
    process = launch()
    load(process, "printing")
    assert generate(process)["counts"] == [3, 3]
    assert '{"seconds": 0}' in (tmp_path / "log").read_text()


def test_an_engine_that_refuses_says_why(launch):
    process = launch()
    with pytest.raises(EngineFailure, match="fake: FileNotFoundError: no model here"):
        load(process, "absent")


def test_an_engine_that_dies_leaves_its_last_words(launch):
    process = launch()
    load(process, "dying")
    with pytest.raises(EngineFailure, match=r"ended with 3\n +out of luck"):
        generate(process)
    with pytest.raises(EngineFailure, match="fake has ended"):
        generate(process)
    process.close()


def test_an_engine_that_hangs_is_killed(launch):
    process = launch()
    load(process, "hanging")
    began = time.perf_counter()
    with pytest.raises(EngineFailure, match="not answered for 0"):
        generate(process, timeout_s=0.3)
    assert time.perf_counter() - began < 10
    assert group_peak_bytes(process.group) == 0


def test_an_adapter_that_cannot_be_imported(launch):
    process = launch(adapter="import there_is_no_such_module")
    with pytest.raises(EngineFailure, match=r"ended with 1(\n.*)*no_such_module"):
        load(process)


def test_an_engine_whose_threads_spin_takes_nothing_while_it_is_not_its_turn(launch):
    process = launch()
    load(process, "spinning")
    used = group_cpu_s(process.group)
    time.sleep(0.4)
    assert group_cpu_s(process.group) - used <= 0.02
    assert generate(process)["counts"] == [3, 3]
    process.close()


def test_what_an_engine_started_ends_with_it(launch):
    process = launch()
    child = load(process, "with a child")["facts"]["child"]
    process.close()
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)
