"""Block tables, prefix hits and hashes."""

from __future__ import annotations

import logging

import pytest

from llmd.engine.executor import KVGroup
from llmd.engine.kv_cache import KVCacheManager
from llmd.engine.params import SamplingParams
from llmd.engine.prefix_cache import extend_hashes, root_hash
from llmd.engine.request import Prompt, Request, Span
from llmd.engine.sequence import Sequence
from llmd.errors import ConfigError


def sequence(token_ids, *, spans=(), **changes) -> Sequence:
    request = Request(request_id="r", prompt=Prompt(tuple(token_ids), spans), params=SamplingParams(), **changes)
    return Sequence(request, 0, 0, 0, 1024)


def hashes(entry: Sequence) -> list[bytes]:
    return extend_hashes(entry, 4, len(entry.token_ids) // 4, shared=True)


def test_a_block_hash_covers_all_tokens_before_it():
    left, right = hashes(sequence(range(12))), hashes(sequence([9, *range(1, 12)]))
    assert len(left) == 3
    assert not set(left) & set(right)
    assert hashes(sequence([*range(8), 0, 0, 0, 0]))[:2] == left[:2]


def test_roots_differ_by_namespace_adapter_and_request():
    plain, other = sequence([1]), sequence([1], namespace=b"key", adapter=None)
    swapped = sequence([1], namespace=b"", adapter="key")
    roots = {root_hash(entry, shared=True) for entry in (plain, other, swapped)}
    roots.add(root_hash(plain, shared=False))
    assert len(roots) == 4


def test_a_span_changes_only_the_blocks_it_touches_and_those_after():
    plain = hashes(sequence(range(16)))
    with_image = hashes(sequence(range(16), spans=(Span(6, 4, b"cat", "image-1"),)))
    with_other = hashes(sequence(range(16), spans=(Span(6, 4, b"dog", "image-2"),)))
    assert with_image[0] == plain[0]
    assert all(a != b != c for a, b, c in zip(with_image[1:], with_other[1:], plain[1:], strict=True))


def test_admit_changes_nothing_when_blocks_are_short():
    manager = KVCacheManager(6, 4, (KVGroup(),), enable_prefix_caching=True)
    first = sequence(range(9))
    assert manager.admit(first, 0, use_cache=True)
    assert [len(table) for table in first.block_ids] == [3]
    manager.register(first, 9)
    second = sequence([*range(8), *range(50, 59)])  # shares two blocks, needs three more
    assert not manager.admit(second, 1, use_cache=True)
    assert manager.pool.num_free == 3
    assert manager.admit(second, 0, use_cache=True)
    assert second.num_computed_tokens == 8
    assert second.block_ids[0][:2] == first.block_ids[0][:2]
    manager.release(first)
    manager.release(second)
    manager.pool.check([])


def test_hits_that_wake_cached_blocks_count_against_what_is_free():
    manager = KVCacheManager(4, 4, (KVGroup(),), enable_prefix_caching=True)
    first = sequence(range(9))
    manager.admit(first, 0, use_cache=True)
    manager.register(first, 8)
    manager.release(first)
    again = sequence([*range(8), *range(70, 79)])  # two cached blocks are free only until they are hit
    assert not manager.admit(again, 0, use_cache=True)
    assert manager.pool.num_free == 4


def test_two_groups_have_tables_of_their_own_and_hit_together():
    manager = KVCacheManager(16, 4, (KVGroup(name="a"), KVGroup(name="b")), enable_prefix_caching=True)
    first = sequence(range(9))
    manager.admit(first, 0, use_cache=True)
    manager.register(first, 9)
    assert len(set(first.block_ids[0]) & set(first.block_ids[1])) == 0
    second = sequence(range(9))
    manager.admit(second, 0, use_cache=True)
    assert second.num_computed_tokens == 8
    assert [second.block_ids[group][:2] for group in (0, 1)] == [first.block_ids[group][:2] for group in (0, 1)]
    assert len(manager.grow(second)) == 2


def test_a_state_has_no_blocks_and_no_prefix_is_found_behind_it(caplog):
    caplog.set_level(logging.INFO)
    manager = KVCacheManager(8, 4, (KVGroup(), KVGroup(name="state", kind="state")), enable_prefix_caching=True)
    assert caplog.text.count("prefix caching is off") == 1
    first, second = sequence(range(9)), sequence(range(9))
    assert manager.admit(first, 0, use_cache=True)
    assert [len(table) for table in first.block_ids] == [3]
    manager.register(first, 9)
    assert manager.admit(second, 0, use_cache=True)
    assert second.num_computed_tokens == 0
    assert not set(first.block_ids[0]) & set(second.block_ids[0])
    manager.release(first)
    manager.release(second)
    assert manager.pool.num_cached == 0
    manager.pool.check([])


def test_an_unknown_group_kind_is_refused():
    with pytest.raises(ConfigError, match="'mamba'"):
        KVCacheManager(4, 4, (KVGroup(kind="mamba"),), enable_prefix_caching=True)
