"""Stop 8 of 14: blocks of a request are reused from the prefix cache or taken anew. Next: gang/gang_runner.py.

A `BlockTable` lists a request's blocks in order of position; the `BlockManager` extends it, offers its full blocks for
reuse once their KV has been computed, and gives its blocks back. The last prompt token is never taken from the cache:
something must be computed to sample from. Knows nothing of tensors, steps or other engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from atom_cluster.kv_cache.block_pool import BlockPool, Holder, Prefix
from atom_cluster.kv_cache.prefix_hash import hash_block, pack_tokens
from atom_cluster.units import ceil_div


@dataclass(slots=True)
class BlockTable:
    """One request's blocks, all held under one kind."""

    holder: Holder
    block_ids: list[int] = field(default_factory=list)
    last_prefix: Prefix | None = None
    """Prefix that ends with the last block that was found in or offered to the cache."""
    num_named: int = 0
    """Leading blocks that `last_prefix` covers."""


class BlockManager:
    """KV blocks of one engine, request by request."""

    def __init__(self, *, num_blocks: int, block_size: int, seed: int, prefix_caching: bool) -> None:
        """`seed` is `prefix_hash.seed_of` the engine's fingerprint."""
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._seed = seed
        self._prefix_caching = prefix_caching

    def match(self, prompt: Sequence[int], holder: Holder) -> BlockTable:
        """A table that holds the longest cached prefix of the prompt, without its last token."""
        table = BlockTable(holder)
        if not self._prefix_caching:
            return table
        for start in range(0, len(prompt) - self.block_size, self.block_size):
            packed = pack_tokens(prompt[start : start + self.block_size])
            found = self.pool.find(hash_block(self._parent_hash(table), packed), packed, table.last_prefix)
            if found is None:
                break
            block_id, table.last_prefix = found
            self.pool.share(block_id, holder)
            table.block_ids.append(block_id)
            table.num_named += 1
        return table

    def count_matching(self, prompt: Sequence[int]) -> int:
        """Tokens that `match` would find."""
        table = self.match(prompt, "running")
        num_tokens = len(table.block_ids) * self.block_size
        self.release(table)
        return num_tokens

    def blocks_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that the table lacks to hold so many tokens."""
        return max(0, ceil_div(num_tokens, self.block_size) - len(table.block_ids))

    def extend(self, table: BlockTable, num_tokens: int) -> tuple[int, ...] | None:
        """Make room for so many tokens in all; the new blocks, or None and nothing changed if there are too few."""
        block_ids = self.pool.acquire(self.blocks_missing(table, num_tokens), table.holder)
        if block_ids is None:
            return None
        table.block_ids.extend(block_ids)
        return tuple(block_ids)

    def offer(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Let others reuse the full blocks of the first `num_computed` tokens, whose KV is in place."""
        if not self._prefix_caching:
            return
        num_full = min(num_computed, len(token_ids)) // self.block_size
        for index in range(table.num_named, num_full):
            packed = pack_tokens(token_ids[index * self.block_size : (index + 1) * self.block_size])
            table.last_prefix = Prefix(hash_block(self._parent_hash(table), packed), packed, table.last_prefix)
            self.pool.cache(table.block_ids[index], table.last_prefix)
            table.num_named += 1

    def rename(self, table: BlockTable, holder: Holder) -> None:
        """Hold the table's blocks under another kind."""
        self.pool.change_holder(table.block_ids, table.holder, holder)
        table.holder = holder

    def release(self, table: BlockTable) -> None:
        """Give all blocks back; the table is empty afterwards."""
        self.pool.release(table.block_ids, table.holder)
        table.block_ids.clear()
        table.last_prefix, table.num_named = None, 0

    def _parent_hash(self, table: BlockTable) -> int:
        return self._seed if table.last_prefix is None else table.last_prefix.hash
