"""The roofline's formula, and the share of it that an engine's last decode steps achieved."""

import asyncio
from dataclasses import replace

import pytest
from engine.driving import request, running

from llmd.engine import roofline
from llmd.engine.executor import ExecutorInfo, KVGroup


def info_of(**changes):
    values = {
        "num_blocks": 10, "block_size": 4, "max_num_seqs": 1, "max_model_len": 8, "vocab_size": 9, "weights_bytes": 1000,
        "kv_bytes": 800,
    }  # fmt: skip
    return ExecutorInfo(**values | changes)


def test_bytes_read_are_weights_and_kv():
    assert roofline.read_bytes(info_of(), 3, 50) == 3 * 1000 + 50 * 20
    two = info_of(kv_groups=(KVGroup(), KVGroup(name="other")))
    assert roofline.read_bytes(two, 3, 50) == 3 * 1000 + 50 * 40
    assert roofline.read_bytes(info_of(num_blocks=0, kv_bytes=0, kv_groups=()), 3, 50) == 3000


def test_a_table_of_which_few_rows_are_read_does_not_count():
    assert roofline.read_bytes(info_of(facts={"step_bytes": 600}), 3, 50) == 3 * 600 + 50 * 20


def test_the_share_needs_a_measured_bandwidth_and_steps():
    assert roofline.utilization(info_of(), 3, 50, 1.0) is None
    info = info_of(facts={"memory_bandwidth": 8000.0})
    assert roofline.utilization(info, 3, 50, 1.0) == pytest.approx(0.5)
    assert roofline.utilization(info, 0, 0, 0.0) is None


def test_fewer_bits_reach_a_smaller_share():
    assert [roofline.likely_share(bits) for bits in (32, 16, 8.5, 4.25, 2)] == [0.9, 0.9, 0.85, 0.7, 0.7]
    assert roofline.max_decode_rate(1e9, 1e6, 1e3, 1000) == pytest.approx(500.0)


async def test_an_engine_tells_the_share_of_its_last_decode_steps():
    """Steps that compute a prompt do not count: arithmetic takes their time."""
    async with running() as (engine, sink, executor):
        submit = executor.submit

        async def timed(plan, masks):
            return replace(await submit(plan, masks), forward_s=0.5 if plan.num_tokens == 1 else 9.0)

        executor.submit = lambda plan, masks=None: asyncio.ensure_future(timed(plan, masks))
        assert engine.stats().memory_utilization is None
        engine.add(request("a", length=10, sampling={"max_tokens": 6}))
        await sink.end("a")
        assert engine.stats().memory_utilization is None
        engine.info.facts.update(memory_bandwidth=1e6, step_bytes=1e5)
        per_token = roofline.kv_token_bytes(engine.info)
        expected = (5 * 1e5 + (11 + 12 + 13 + 14 + 15) * per_token) / 2.5 / 1e6
        assert engine.stats().memory_utilization == pytest.approx(expected)
        assert engine.stats().read_bytes == pytest.approx(6 * 1e5 + 75 * per_token)
