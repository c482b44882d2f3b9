"""Reading memory for its own sake, and keeping threads where they are put."""

import os
import sys
import threading

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.machine import pin_threads, read_s

compiled = pytest.mark.skipif(not sys.platform.startswith("linux") or native.library() is None, reason="no compiler")


@pytest.mark.parametrize("size", [1, 15, 16, 100, 4099])
def test_every_size_is_read(size):
    assert read_s(torch.ones(size)) > 0


def test_only_plain_memory_is_read():
    with pytest.raises(ValueError, match="contiguous float32"):
        read_s(torch.ones(4, 4).t()[:, :2])
    with pytest.raises(ValueError, match="contiguous float32"):
        read_s(torch.ones(4, dtype=torch.int8))


def test_without_a_compiler_torch_reads_and_threads_stay_free(monkeypatch):
    monkeypatch.setattr(native, "_found", [None])
    assert read_s(torch.ones(100)) > 0
    assert pin_threads((0, 0)) == 0


@compiled
def test_threads_stay_where_they_are_put_and_their_leader_is_free():
    allowed = sorted(os.sched_getaffinity(0))
    cpus = (allowed[0], allowed[-1])
    found = {}

    def lead():
        before = threads()
        native.set_num_threads(2)
        found["moved"] = pin_threads(cpus)
        found["workers"] = [os.sched_getaffinity(thread) for thread in threads() - before]
        found["leader"] = sorted(os.sched_getaffinity(0))

    leader = threading.Thread(target=lead)
    leader.start()
    leader.join()
    assert found == {"moved": 1, "workers": [{cpus[1]}], "leader": allowed}


@compiled
def test_a_cpu_that_is_not_there_moves_nobody():
    moved = []

    def lead():
        native.set_num_threads(2)
        moved.append(pin_threads((0, 100_000)))

    leader = threading.Thread(target=lead)
    leader.start()
    leader.join()
    assert moved == [0]


def threads():
    """Ids of this process's threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}
