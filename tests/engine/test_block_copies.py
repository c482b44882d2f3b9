"""Sequences of one request share the end of their prompt too: a copied block instead of a second prefill."""

from __future__ import annotations

import pytest
from engine.test_kv_cache import sequence
from engine.test_scheduler_properties import VOCAB, Drive, check_outputs, worlds
from fakes import fake_info
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.executor import KVGroup
from llmd.engine.kv_cache import KVCacheManager
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason

ONE, TWO = (KVGroup(),), (KVGroup(name="a"), KVGroup(name="b"))


def drive(*, caching=True, budget=64, depth=2, **info) -> Drive:
    device = fake_info(**{"num_blocks": 64, "block_size": 4, "max_model_len": 64, "vocab_size": VOCAB, **info})
    config = SchedulerConfig(max_num_seqs=device.max_num_seqs, max_num_batched_tokens=budget, watermark=0)
    return Drive(device, config, CacheConfig(block_size=device.block_size, enable_prefix_caching=caching), depth)


def asked(name: str, length: int, **params) -> Request:
    params = SamplingParams(**{"n": 4, "max_tokens": 6, "seed": 3, **params})
    return Request(request_id=name, prompt=Prompt(tuple(range(length))), params=params)


def watched(made: Drive) -> list:
    """The plans that it will run."""
    plans, run = [], made.device.run
    made.device.run = lambda plan, bitmask=None: plans.append(plan) or run(plan, bitmask)
    return plans


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("length", "budget"), [(3, 64), (4, 64), (23, 64), (24, 64), (23, 9), (24, 9)])
def test_after_the_first_prefill_siblings_begin_with_a_step_of_one_token(length, budget, caching):
    made = drive(caching=caching, budget=budget)
    plans = watched(made)
    made.add(asked("r", length))
    made.finish()
    check_outputs(made.clients["r"])
    assert made.device.num_copies == 3
    assert made.device.num_computed == length + 3 + 4 * 5
    prefills = [count for plan in plans for count in plan.counts if count > 1]
    assert sum(prefills) in (length, length - 1)  # the last chunk may be one token
    (begun,) = [plan for plan in plans if plan.block_copies]
    assert len(begun.admitted) == 3
    assert set(begun.counts) == {1}
    assert all(begun.samples)


def test_each_group_has_its_copy_and_all_copy_from_one_sibling():
    made = drive(kv_groups=TWO)
    plans = watched(made)
    made.add(asked("r", 11, n=3))
    made.finish()
    check_outputs(made.clients["r"])
    (copies,) = [plan.block_copies for plan in plans if plan.block_copies]
    assert len(copies) == 4
    assert len({source for source, _ in copies}) == 2
    assert len({target for _, target in copies}) == 4


@pytest.mark.parametrize(
    ("info", "length", "params"),
    [
        ({}, 21, {}),  # the last token has a block of its own
        ({"block_size": 1}, 9, {}),
        ({}, 1, {}),
        ({}, 23, {"prompt_logprobs": 1}),
        ({"kv_groups": (*ONE, KVGroup(name="state", kind="state"))}, 3, {}),
        ({}, 23, {"max_tokens": 1}),  # nobody is left to copy from
        ({}, 23, {"n": 1}),
    ],
)
def test_nothing_is_copied_where_nothing_is_won_or_more_is_wanted(info, length, params):
    made = drive(**info)
    made.add(asked("r", length, **params))
    made.finish()
    check_outputs(made.clients["r"])
    assert made.device.num_copies == 0


def test_another_request_over_the_same_prompt_is_no_sibling():
    made = drive()
    made.add(asked("a", 23, n=1, max_tokens=30))
    for _ in range(4):
        made.turn()
    made.add(asked("b", 23, n=1))
    made.finish()
    assert made.device.num_copies == 0


def test_where_the_first_has_ended_any_other_is_copied_from():
    made = drive(max_num_seqs=2)
    made.add(asked("r", 23, n=4, max_tokens=9))
    plans = watched(made)
    for _ in range(4):
        made.turn()
    leader = made.scheduler.requests["r"][0]
    made.scheduler.end(leader, FinishReason.ABORT)
    made.clients["r"].is_aborted = True
    made.finish()
    check_outputs(made.clients["r"])
    assert made.device.num_copies == 3
    sources = {source for plan in plans for source, _ in plan.block_copies}
    assert len(sources) > 1


def test_a_source_that_ends_while_its_copy_is_in_flight_is_given_away_behind_it():
    made = drive(num_blocks=16, max_num_seqs=2)
    made.add(asked("r", 23, n=2, max_tokens=30))
    while not (step := made.scheduler.schedule(0.0)).plan.block_copies:
        made.in_flight.append([step, None])
        made.run_first()
        committed, result = made.in_flight.popleft()
        made.take(made.scheduler.commit(committed, result))
    made.in_flight.append([step, None])
    ((source, _),) = step.plan.block_copies
    made.scheduler.end(made.scheduler.requests["r"][0], FinishReason.ABORT)
    made.clients["r"].is_aborted = True
    assert not made.scheduler.kv_cache.pool.is_held(source)
    made.add(Request(request_id="b", prompt=Prompt(tuple(range(9, 49))), params=SamplingParams(max_tokens=2, seed=0)))
    later = made.scheduler.schedule(0.0)
    assert any(source in update.block_ids for update in later.plan.block_updates)
    made.in_flight.append([later, None])
    made.finish()
    for client in made.clients.values():
        check_outputs(client)


def test_a_preempted_sibling_is_no_source_and_goes_on_as_before():
    made = drive(num_blocks=14, max_num_seqs=3)
    plans = watched(made)
    made.add(asked("r", 15, n=3, max_tokens=20))
    made.finish()
    check_outputs(made.clients["r"])
    assert made.scheduler.num_preemptions > 0
    assert made.device.num_copies == sum(len(plan.block_copies) for plan in plans) >= 2


def test_the_books_of_a_copy():
    manager = KVCacheManager(12, 4, TWO, enable_prefix_caching=True)
    first, second, third = sequence(range(11)), sequence(range(11)), sequence(range(11))
    assert manager.admit(first, 0, use_cache=True)
    manager.register(first, 11)
    assert manager.admit(second, 0, use_cache=True)
    assert second.num_computed_tokens == 8
    copies = manager.copy_tail(second, first)
    assert copies == [(first.block_ids[group][2], second.block_ids[group][2]) for group in (0, 1)]
    assert second.num_computed_tokens == 10
    manager.pool.forget()
    assert manager.admit(third, 0, use_cache=True) is False
    manager.release(second)
    manager.release(first)
    assert manager.admit(third, 0, use_cache=True)
    assert manager.copy_tail(third, first) == []  # what comes before was not found
    assert third.num_computed_tokens == 0
    manager.release(third)
    manager.pool.check([])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(world=worlds(), data=st.data())
def test_many_siblings_in_any_schedule(world, data):
    """Aborts, ends of one sibling, lost steps: every token is still that of a request alone."""
    made = Drive(*world)
    for index in range(data.draw(st.integers(1, 5))):
        length, count = data.draw(st.integers(1, 30)), data.draw(st.integers(2, 6))
        made.add(asked(f"r{index}", length, n=count, max_tokens=data.draw(st.integers(1, 12)), seed=index))
        for _ in range(data.draw(st.integers(0, 6))):
            made.turn()
        what = data.draw(st.sampled_from(["nothing", "nothing", "end one", "lose steps"]))
        live = [entry for group in made.scheduler.requests.values() for entry in group if not entry.is_finished]
        if what == "end one" and live:
            victim = live[data.draw(st.integers(0, len(live) - 1))]
            made.clients[victim.request.request_id].is_aborted = True
            made.scheduler.end(victim, FinishReason.ABORT)
        elif what == "lose steps":
            for step, result in made.in_flight:
                if result is None:
                    made.device.fail(step.plan)
            made.scheduler.roll_back([step for step, _ in made.in_flight])
            made.in_flight.clear()
        made.scheduler.check()
    made.finish()
    for client in made.clients.values():
        check_outputs(client)
