"""The pool of KV blocks: who holds them, which can be found again by hash, which goes next.

    blank ──allocate──► held (ref_count ≥ 1) ──release, no hash──► blank
      ▲                  │      ▲
      │ evict            │      │ acquire (prefix hit)
      │                  ▼      │
      └────────────── cached (ref_count 0, has a hash; least recently released goes first)

Blank blocks are taken before any cached one is evicted. Blocks of a sequence are released tail first, so that what is
evicted first is what the fewest others can share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """`num_blocks` equal blocks, named 0 … num_blocks-1. Every operation is O(1) a block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: low ids first, so that small loads stay compact
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by hash, held or not."""
        return len(self._by_hash)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks for one holder; the caller has checked num_free."""
        blank = self._blank
        block_ids = [blank.pop() if blank else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        block_hash = self._hashes[block_id]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hashes[block_id] = None
        self.num_evictions += 1
        return block_id

    def acquire(self, block_ids: Iterable[int]) -> None:
        """One more holder for each of these cached or held blocks."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: list[int]) -> None:
        """One holder less for each, the tail first."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if self._hashes[block_id] is None:
                    self._blank.append(block_id)
                else:
                    self._cached[block_id] = None

    def register(self, block_id: int, block_hash: bytes) -> None:
        """A held block is full and computed: let others find it. The first block of a hash stays the one."""
        if block_hash not in self._by_hash and self._hashes[block_id] is None:
            self._by_hash[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def lookup(self, block_hash: bytes) -> int | None:
        """The block with this hash, held or cached."""
        return self._by_hash.get(block_hash)

    def is_held(self, block_id: int) -> bool:
        """Whether any sequence holds the block."""
        return self._ref_counts[block_id] > 0

    def forget(self) -> None:
        """Empty the prefix cache; held blocks stay with their holders and can no longer be found."""
        for block_id in self._by_hash.values():
            self._hashes[block_id] = None
        self._by_hash.clear()
        self._blank.extend(self._cached)
        self._cached.clear()

    def check(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless `held` (with repetition) is exactly what the ref_counts say, and none is lost."""
        counts = [0] * self.num_blocks
        for block_id in held:
            counts[block_id] += 1
        assert counts == self._ref_counts, "ref_counts differ from the holders"
        free = [*self._blank, *self._cached]
        assert len(free) == len(set(free)), "a block is free twice"
        assert all(counts[block_id] == 0 for block_id in free), "a held block is free"
        assert len(free) + sum(1 for count in counts if count) == self.num_blocks, "a block is lost"
        assert all(self._hashes[block_id] == block_hash for block_hash, block_id in self._by_hash.items())
