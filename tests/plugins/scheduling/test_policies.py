"""Both orders of the waiting queue keep every sequence exactly once and serve in the order they promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd.config import SchedulerConfig
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.sequence import Sequence
from llmd_plugins.scheduling import fcfs, priority


def sequence(seq_id: int, *, level: int = 0, arrival_s: float = 0.0) -> Sequence:
    request = Request(
        request_id=str(seq_id), prompt=Prompt((1,)), params=SamplingParams(), priority=level, arrival_s=arrival_s
    )
    return Sequence(request, 0, seq_id, 0, 16)


def order(queue) -> list[int]:
    return [entry.seq_id for entry in queue.ordered(0.0)]


@pytest.mark.parametrize("module", [fcfs, priority])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-3, 3), st.booleans())))
def test_what_is_pushed_and_not_removed_is_there_once(module, steps):
    [spec] = module.llmd_register_scheduling_policies()
    queue, inside = spec.build(SchedulerConfig()), {}
    for seq_id, level, front in steps:
        if seq_id in inside:
            queue.remove(inside.pop(seq_id))
        else:
            inside[seq_id] = sequence(seq_id, level=level, arrival_s=float(seq_id))
            (queue.push_front if front else queue.push)(inside[seq_id])
        assert sorted(order(queue)) == sorted(inside)
        assert len(queue) == len(inside)


def test_first_come_first_served_and_preempted_before_all():
    queue = fcfs.FcfsQueue()
    for seq_id in (3, 1, 2):
        queue.push(sequence(seq_id))
    queue.push_front(sequence(0))
    assert order(queue) == [0, 3, 1, 2]


def test_priorities_first_and_waiting_makes_up_for_them():
    queue = priority.PriorityQueue(aging_s=10.0)
    queue.push(sequence(1, level=1, arrival_s=0.0))
    queue.push(sequence(2, level=0, arrival_s=5.0))
    queue.push(sequence(3, level=0, arrival_s=11.0))  # the first has waited more than a level's worth by then
    queue.push_front(sequence(4, level=0, arrival_s=1.0))
    assert order(queue) == [4, 2, 1, 3]
