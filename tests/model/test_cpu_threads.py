"""How many threads, and where: by affinity, cgroups, cores, NUMA nodes and what the configuration says."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model.machines import add_cgroup2, add_cpus, write

from llmd.config import ModelConfig
from llmd.errors import ModelError
from llmd.model.cpu_threads import Threads, cache_bytes, choose_threads, find_cores, num_threads, parse_cpus, show_cpus


def chosen(root, cpus, wanted=None, affinity="auto", **environ):
    return choose_threads(
        wanted, affinity, root=root, allowed=range(cpus) if isinstance(cpus, int) else cpus, environ=environ
    )


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (2, 2), (3, 2), (8, 7)])
def test_the_loop_keeps_a_core_where_there_are_enough(tmp_path, cores, count):
    threads = chosen(tmp_path, cores)
    assert threads.count == count
    assert threads.is_pinned == (cores > 2)
    assert threads.cpus == tuple(range(cores))[cores > 2 :]
    assert ("is left to the event loop" in str(threads)) == (cores > 2)


def test_hyperthreads_are_one_core(tmp_path):
    add_cpus(tmp_path, [[n, n + 4] for n in range(4)], [list(range(8))])
    assert chosen(tmp_path, 8) == Threads(3, (1, 2, 3), True, "one a core, CPU 0 is left to the event loop")
    assert chosen(tmp_path, {0, 1, 4, 5}).cpus == (0, 1)
    assert not chosen(tmp_path, {0, 1, 4, 5}).is_pinned
    assert chosen(tmp_path, {6, 7, 1}).cpus == (6, 7)  # the mask has one thread of each core


def test_one_node_is_taken_and_the_log_says_so(tmp_path):
    add_cpus(tmp_path, [[n] for n in range(12)], [[0, 1, 2, 3], list(range(4, 12))])
    threads = chosen(tmp_path, 12)
    assert threads.cpus == tuple(range(5, 12))
    assert "all of NUMA node 1; cpu_threads takes more, of node 0" in threads.why
    assert chosen(tmp_path, 12, wanted=6).cpus == tuple(range(4, 12))
    assert chosen(tmp_path, 12, wanted=10).cpus == ()


def test_a_quota_says_how_many_but_not_which(tmp_path):
    top = add_cgroup2(tmp_path, "/pod")
    write(top, "pod/cpu.max", "350000 100000")
    assert chosen(tmp_path, 16) == Threads(2, why="the cgroup grants 3.5 of 16 cores")
    assert chosen(tmp_path, 2).count == 2
    write(top, "pod/cpu.max", "20000 100000")
    assert chosen(tmp_path, 16).count == 1


def test_who_names_a_number_is_heard(tmp_path):
    assert chosen(tmp_path, 8, OMP_NUM_THREADS="4,2") == Threads(4, why="OMP_NUM_THREADS")
    assert chosen(tmp_path, 8, wanted=3, OMP_NUM_THREADS="4") == Threads(3, why="cpu_threads")
    assert chosen(tmp_path, 8, OMP_NUM_THREADS="many").count == 7
    with pytest.raises(ModelError, match="cpu_threads 9 are too many: this process may use CPUs 0-7, 8"):
        chosen(tmp_path, 8, wanted=9)


def test_who_places_threads_is_left_alone(tmp_path):
    for threads in (chosen(tmp_path, 8, affinity="none"), chosen(tmp_path, 8, OMP_PROC_BIND="close")):
        assert (threads.count, threads.cpus, threads.is_pinned) == (7, (), False)


def test_cpus_by_name(tmp_path):
    assert chosen(tmp_path, 8, affinity="4-6,1") == Threads(4, (4, 5, 6, 1), True, "cpu_affinity")
    assert chosen(tmp_path, 8, wanted=2, affinity="4-6").cpus == (4, 5)
    with pytest.raises(ModelError, match="names CPUs 8-9, which this process may not use: it may use 0-7"):
        chosen(tmp_path, 8, affinity="7-9")
    with pytest.raises(ModelError, match="cpu_threads 4 are more than the 3 CPUs"):
        chosen(tmp_path, 8, wanted=4, affinity="4-6")
    with pytest.raises(ModelError, match="cpu_affinity: '6-4' is no range"):
        chosen(tmp_path, 8, affinity="6-4")


@pytest.mark.parametrize("value", ["", "all", "1;2", "-1", "1-", "99999", "0x1"])
def test_the_configuration_takes_cpus_only(value):
    with pytest.raises(ValueError, match=r"'auto', 'none' or CPUs such as '0-3,8'"):
        ModelConfig(cpu_affinity=value)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_cpus_are_shown_as_they_are_read(cpus):
    assert set(parse_cpus(show_cpus(cpus))) == cpus


@pytest.mark.parametrize("text", ["", "a", "1-2-3", "3-1", "1,,2", "-"])
def test_no_cpus(text):
    with pytest.raises(ValueError, match="CPUs"):
        parse_cpus(text)


def test_a_machine_that_tells_nothing(tmp_path):
    assert [core.cpus for core in find_cores([3, 1], tmp_path)] == [(1,), (3,)]
    assert cache_bytes(tmp_path) == 0


def test_last_level_caches_are_counted_once(tmp_path):
    add_cpus(tmp_path, [[n] for n in range(4)], [[0, 1], [2, 3]], cache_kib=1024)
    assert cache_bytes(tmp_path) == 2 << 20


def test_this_machine():
    assert 1 <= num_threads() <= max(os.cpu_count() or 1, int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.mark.parametrize(
    ("given", "found"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")]
)
def test_waiting_threads_do_not_spin_for_long(given, found):
    """Set before torch loads libgomp, by the first import of anything of ours; who said otherwise is heard."""
    code = "import os, sys; from llmd import LLM; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == found
