"""What others use of the machine, what a group of processes has used, and the read pass."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks.cpu import machine
from benchmarks.cpu.machine import Quiet, Use, group_cpu_s, group_peak_bytes, read_bandwidth, wait_until_quiet

TICKS = os.sysconf("SC_CLK_TCK")


def test_busy_time_leaves_out_idling_waiting_and_guests(tmp_path, monkeypatch):
    (tmp_path / "stat").write_text("cpu  100 20 3000 999999 888888 40 5 600 70 8\ncpu0 1 1 1 1\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.busy_s() == pytest.approx((100 + 20 + 3000 + 40 + 5 + 600) / TICKS)


def test_foreign_use_is_what_is_not_ones_own(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before, after = Use(at_s=10.0, busy_s=100.0, own_s=5.0), Use(at_s=12.0, busy_s=103.0, own_s=7.0)
    assert before.foreign_until(after) == pytest.approx(1.0 / 4.0)


def test_rounding_makes_no_negative_share():
    assert Use(0.0, 0.0, 0.0).foreign_until(Use(1.0, 0.5, 0.6)) == 0.0


def uses(monkeypatch, *shares):
    """Have the checks find these shares, one after the other."""
    left = iter(shares)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(Use, "foreign_until", lambda self, later: next(left))


def test_a_quiet_machine_is_not_waited_for(monkeypatch):
    uses(monkeypatch, 0.01)
    found = wait_until_quiet(limit=0.03, window_s=0.01, bound_s=5.0)
    assert found.is_quiet
    assert found.foreign == 0.01
    assert found.waited_s < 4


def test_a_busy_machine_is_waited_for(monkeypatch):
    uses(monkeypatch, 0.9, 0.5, 0.02)
    found = wait_until_quiet(limit=0.03, window_s=0.01, bound_s=5.0)
    assert found[::2] == (0.02, True)
    assert found.waited_s >= 0.03


def test_waiting_has_a_bound(monkeypatch):
    uses(monkeypatch, *[0.5] * 100)
    found = wait_until_quiet(limit=0.03, window_s=0.01, bound_s=0.05)
    assert isinstance(found, Quiet)
    assert not found.is_quiet
    assert found.foreign == 0.5
    assert 0.05 <= found.waited_s < 1


def test_a_group_is_counted_with_its_children_and_their_memory():
    work = """
import time
held = bytearray(60 << 20)
while time.process_time() < 0.3:
    pass
print(len(held), flush=True)
input()
"""
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    with process:
        process.stdout.readline()
        used, peak = group_cpu_s(process.pid), group_peak_bytes(process.pid)
        process.communicate(b"\n")
    assert used >= 0.25
    assert 60 << 20 < peak < 1 << 30


def test_a_group_that_is_gone_has_used_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    assert group_cpu_s(process.pid) == 0
    assert group_peak_bytes(process.pid) == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_memory_is_read_for_the_time_given(threads):
    began = time.perf_counter()
    assert 1e8 < read_bandwidth(threads, seconds=0.05) < 1e13
    assert time.perf_counter() - began < 20
