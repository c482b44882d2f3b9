"""Block tables of sequences: what to take from the prefix cache, what to allocate, what to give back."""

from __future__ import annotations

import logging

from llmd.engine.blocks import BlockPool
from llmd.engine.executor import KVGroup
from llmd.engine.prefix_cache import extend_hashes
from llmd.engine.sequence import Sequence
from llmd.engine.step import BlockCopy
from llmd.errors import ConfigError

log = logging.getLogger(__name__)


class KVCacheManager:
    """One pool of equal blocks, one block table a KV group and sequence.

    A group that is "full" keeps all of a sequence's blocks, a "state" lies in the sequence's row and has none; a kind with
    other rules for hits and freeing is refused at start, never treated as full. Where there is a state, nothing is found
    again: blocks at the end of a prefix are of no use without the state that the row had there.
    """

    def __init__(
        self, num_blocks: int, block_size: int, groups: tuple[KVGroup, ...], *, enable_prefix_caching: bool
    ) -> None:
        for group in groups:
            if group.kind not in ("full", "state"):
                raise ConfigError(
                    f"KV group {group.name!r} is of kind {group.kind!r}; this version serves 'full' and 'state'"
                )
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.num_groups = sum(group.kind == "full" for group in groups)
        self.has_state = self.num_groups < len(groups)
        if self.has_state and enable_prefix_caching:
            log.info("prefix caching is off: this model's rows have a state, which no block of a prefix holds")
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take over all groups."""
        return -(-num_tokens // self.block_size) * self.num_groups

    def admit(self, sequence: Sequence, num_spare: int, *, use_cache: bool) -> bool:
        """Give a sequence the blocks of all its known tokens, shared ones first, and set num_computed_tokens.

        False, and nothing changed, when fewer than `num_spare` blocks would be left free.
        """
        if not self.num_groups:
            return True
        hits = self._hits(sequence) if use_cache and not self.has_state else []
        num_hits = len(hits[0]) if hits else 0
        pool = self.pool
        num_new = self.blocks_for(len(sequence.token_ids)) - num_hits * self.num_groups
        num_waking = sum(not pool.is_held(block_id) for group in hits for block_id in group)
        if pool.num_free - num_waking - num_new < num_spare:
            return False
        for group in hits:
            pool.acquire(group)
        num_per_group = num_new // self.num_groups
        sequence.block_ids = [
            (hits[group] if hits else []) + pool.allocate(num_per_group) for group in range(self.num_groups)
        ]
        sequence.num_computed_tokens = num_hits * self.block_size
        sequence.num_registered_blocks = num_hits
        self.num_queried_tokens += len(sequence.token_ids)
        self.num_hit_tokens += sequence.num_computed_tokens
        return True

    def _hits(self, sequence: Sequence) -> list[list[int]]:
        """Per group, the cached blocks of the longest prefix; at least one token is left to compute."""
        num_blocks = (len(sequence.token_ids) - 1) // self.block_size
        hashes = extend_hashes(sequence, self.block_size, num_blocks, shared=self.enable_prefix_caching)
        tables: list[list[int]] = [[] for _ in range(self.num_groups)]
        for block_hash in hashes[:num_blocks]:
            found = [self.pool.lookup(_group_key(block_hash, group)) for group in range(self.num_groups)]
            if None in found:
                break
            for table, block_id in zip(tables, found, strict=True):
                assert block_id is not None
                table.append(block_id)
        return tables

    def copy_tail(self, sequence: Sequence, sibling: Sequence) -> list[BlockCopy]:
        """Let a sequence that was just admitted begin with its prompt's last block as a sibling of the same prompt has it.

        All but the last token then count as computed. No copies, and nothing changed, where that block holds no more than
        this token, blocks before it were not found, or a state would be needed as well.
        """
        last = sequence.num_prompt_tokens - 1
        index = last // self.block_size
        if self.has_state or not self.num_groups or not index * self.block_size == sequence.num_computed_tokens < last:
            return []
        sequence.num_computed_tokens = last
        tables = zip(sibling.block_ids, sequence.block_ids, strict=True)
        return [BlockCopy(theirs[index], own[index]) for theirs, own in tables]

    def grow(self, sequence: Sequence) -> list[int] | None:
        """One more block for each group, in group order; None when the pool cannot give them."""
        if self.pool.num_free < self.num_groups:
            return None
        block_ids = self.pool.allocate(self.num_groups)
        for table, block_id in zip(sequence.block_ids, block_ids, strict=True):
            table.append(block_id)
        return block_ids

    def register(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """The first `num_computed_tokens` are computed for certain: let others find the blocks they fill."""
        num_full = num_computed_tokens // self.block_size
        first = sequence.num_registered_blocks
        if num_full <= first:
            return
        if self.has_state:
            sequence.num_registered_blocks = num_full  # none is, and nobody asks again before the next block
            return
        hashes = extend_hashes(sequence, self.block_size, num_full, shared=self.enable_prefix_caching)
        for group, table in enumerate(sequence.block_ids):
            for index in range(first, num_full):
                self.pool.register(table[index], _group_key(hashes[index], group))
        sequence.num_registered_blocks = num_full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence back; those with a hash stay findable until they are evicted."""
        for table in sequence.block_ids:
            self.pool.release(table)
        sequence.block_ids = []
        sequence.num_registered_blocks = 0


def _group_key(block_hash: bytes, group: int) -> bytes:
    return block_hash if group == 0 else block_hash + group.to_bytes(2, "little")
