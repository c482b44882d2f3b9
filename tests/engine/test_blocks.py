"""The block pool against a plain model of itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd.engine.blocks import BlockPool

operations = st.lists(st.tuples(st.sampled_from(["allocate", "release", "register", "hit", "forget"]), st.integers(0, 20)))


@settings(max_examples=300, deadline=None)
@given(operations)
def test_blocks_are_never_lost_or_shared_by_accident(steps):
    pool = BlockPool(8)
    holders: list[list[int]] = []
    for name, number in steps:
        if name == "allocate" and 0 < number <= pool.num_free:
            taken = pool.allocate(number)
            assert not set(taken) & {block for holder in holders for block in holder}
            holders.append(taken)
        elif name == "release" and holders:
            pool.release(holders.pop(number % len(holders)))
        elif name == "register" and holders:
            holder = holders[number % len(holders)]
            pool.register(holder[0], bytes([number]))
        elif name == "hit" and (found := pool.lookup(bytes([number]))) is not None:
            pool.acquire([found])
            holders.append([found])
        elif name == "forget":
            pool.forget()
            assert pool.num_cached == 0
        pool.check(block for holder in holders for block in holder)


def test_the_least_recently_released_cached_block_goes_first_and_blank_ones_before_it():
    pool = BlockPool(4)
    first = pool.allocate(2)
    for block_id in first:
        pool.register(block_id, b"h%d" % block_id)
    pool.release(first)  # the tail is released first, so it goes first
    assert pool.allocate(2) == [2, 3]
    assert pool.num_evictions == 0
    assert pool.allocate(1) == [first[1]]
    assert pool.lookup(b"h%d" % first[0]) == first[0]
    assert pool.lookup(b"h%d" % first[1]) is None


def test_a_wrong_count_is_found():
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="ref_counts"):
        pool.check([])
