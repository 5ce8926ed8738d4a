"""Stop 8 of 14: blocks of a request are reused from the prefix cache or taken anew. Next: gang/gang_runner.py.

A `BlockTable` is what a request holds of every cache group; the `BlockManager` extends it, offers what is computed for
reuse, and gives everything back. A prompt is reused up to the longest prefix for which each group has what the tokens
behind it need. The last prompt token is never taken from the cache: something must be computed to sample from. What
differs between kinds of groups is in `page_groups`. Knows nothing of tensors, steps or other engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.block_pool import BlockPool, Holder, Prefix
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.kv_cache.page_groups import ColumnPages, FullGroup, GroupPages, PageGroupPool, StatePages, make_group
from atom_cluster.kv_cache.prefix_hash import hash_block, pack_tokens
from atom_cluster.units import ceil_div

NewPages = tuple[tuple[int, ...], ...]
"""Per group; empty when no group has any."""


@dataclass(slots=True)
class BlockTable:
    """One request's pages, all held under one kind."""

    holder: Holder
    groups: list[GroupPages] = field(default_factory=list)
    """Empty while nothing was asked for."""
    last_prefix: Prefix | None = None
    """Prefix that ends with the last block that was found in or offered to the cache."""
    num_named: int = 0
    """Leading blocks that `last_prefix` covers."""

    @property
    def block_ids(self) -> list[int]:
        """Blocks of the first group, in order of position."""
        first = self.groups[0] if self.groups else None
        return first.page_ids if isinstance(first, ColumnPages) else []

    def at_entry(self) -> NewPages:
        """Pages of every group as a runner is told when the request enters a row."""
        return tuple(pages.at_entry() for pages in self.groups)


class BlockManager:
    """KV pages of one engine, request by request."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        seed: int,
        prefix_caching: bool,
        other_groups: Sequence[PageGroup] = (),
        max_drafts: int = 0,
    ) -> None:
        """`seed` is `prefix_hash.seed_of` the engine's fingerprint. A row may have up to `max_drafts` drafts.

        Raises ConfigError for a group with too few pages for even one request.
        """
        self.block_size = block_size
        self.lookahead = max(0, max_drafts - 1)
        """Positions behind those of a sampling step that drafting writes to."""
        first = FullGroup(num_blocks, block_size=block_size)
        others = [
            make_group(group, block_size=block_size, max_drafts=max_drafts, lookahead=self.lookahead)
            for group in other_groups
        ]
        self._groups: tuple[PageGroupPool, ...] = (first, *others)
        self.pool: BlockPool = first.pool
        """Of the first group: the blocks that other engines and the router know of."""
        # A group with as many pages as the first holds whatever that one does.
        limits = [None if pool.pool.num_blocks >= num_blocks else pool.max_chunk for pool in others]
        self.max_chunk = min((limit for limit in limits if limit is not None), default=None)
        """Most tokens of one request in a step; None: any number."""
        self.has_other_groups = bool(others)
        """Whether there are groups besides the first."""
        self.has_states = any(group.kind == "state" for group in other_groups)
        """Whether there is a group of states."""
        self._seed = seed
        self._prefix_caching = prefix_caching
        for group, limit in zip(other_groups, limits):
            _check_size(group, max_chunk=limit, max_drafts=max_drafts)

    # --- prefixes

    def match(
        self, prompt: Sequence[int], holder: Holder, *, in_first_group: bool = False, reuses: bool = True
    ) -> BlockTable:
        """A table that holds the longest cached prefix of the prompt, without its last token.

        With `in_first_group`, other groups neither count nor take part: what they need comes from another engine.
        Without `reuses` it holds nothing: all of the prompt is to be computed.
        """
        prefixes = self._find_prefixes(prompt) if reuses else []
        if not in_first_group:
            prefixes = prefixes[: self._num_common(prefixes)]
        table = BlockTable(holder, [group.new_pages(len(prompt)) for group in self._groups])
        for pages in table.groups[:1] if in_first_group else table.groups:
            pages.adopt(prefixes, holder)
        table.last_prefix = prefixes[-1] if prefixes else None
        table.num_named = len(prefixes)
        return table

    def _find_prefixes(self, prompt: Sequence[int]) -> list[Prefix]:
        """Prefixes of the prompt whose blocks the first group has cached, from the start without a gap."""
        prefixes: list[Prefix] = []
        parent: Prefix | None = None
        if not self._prefix_caching:
            return prefixes
        for start in range(0, len(prompt) - self.block_size, self.block_size):
            packed = pack_tokens(prompt[start : start + self.block_size])
            found = self.pool.find(hash_block(self._hash_of(parent), packed), packed, parent)
            if found is None:
                break
            parent = found[1]
            prefixes.append(parent)
        return prefixes

    def _num_common(self, prefixes: Sequence[Prefix]) -> int:
        """Leading blocks that every group can go on behind."""
        num_blocks, before = len(prefixes), -1
        while num_blocks != before:
            before = num_blocks
            for group in self._groups:
                num_blocks = group.longest(prefixes, num_blocks)
        return num_blocks

    def count_matching(self, prompt: Sequence[int]) -> int:
        """Tokens that `match` would find."""
        table = self.match(prompt, "running")
        num_tokens = len(table.block_ids) * self.block_size
        self.release(table)
        return num_tokens

    def confirm(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """The first `num_computed` tokens are in place: let others reuse them, and give back what was for them only."""
        if self._prefix_caching:
            self._offer(table, token_ids, min(num_computed, len(token_ids)) // self.block_size)
        if self.has_other_groups:
            for pages in table.groups[1:]:
                pages.settle(num_computed, table.holder)

    def _offer(self, table: BlockTable, token_ids: Sequence[int], num_blocks: int) -> None:
        for column in range(table.num_named, num_blocks):
            packed = pack_tokens(token_ids[column * self.block_size : (column + 1) * self.block_size])
            prefix = Prefix(hash_block(self._hash_of(table.last_prefix), packed), packed, table.last_prefix)
            for pages in table.groups:
                pages.keep(column, prefix)
            table.last_prefix = prefix
            table.num_named += 1

    def _hash_of(self, prefix: Prefix | None) -> int:
        return self._seed if prefix is None else prefix.hash

    # --- room for a step

    def missing(self, table: BlockTable, num_tokens: int, *, num_next: int | None = None) -> tuple[int, ...]:
        """Pages of each group that the table lacks to hold so many tokens.

        With `num_next`, only so many are computed next: what the other groups need for those behind is not counted, as
        it may be what they give back until then.
        """
        groups = self._pages_of(table)
        missing = groups[0].missing(num_tokens)
        if len(groups) == 1:
            return (missing,)
        num_next = num_tokens if num_next is None else num_next
        return (missing, *(pages.missing(num_next) for pages in groups[1:]))

    def has_room(self, missing: Sequence[int], *, besides: Sequence[int] = ()) -> bool:
        """Whether so many pages of each group could be taken, and others besides."""
        counts = besides or (0,) * len(self._groups)
        return all(m + n <= group.pool.num_available for m, n, group in zip(missing, counts, self._groups))

    def extend(self, table: BlockTable, num_tokens: int, *, num_next: int | None = None) -> NewPages | None:
        """Take what `missing` counts: the new pages of each group, or None and nothing changed if there are too few."""
        missing = self.missing(table, num_tokens, num_next=num_next)
        is_any_missing = any(missing)
        if is_any_missing and not self.has_room(missing):
            return None
        if not is_any_missing and not self.has_states:
            return ()
        new = tuple(pages.extend(count, table.holder) for pages, count in zip(table.groups, missing))
        return new if any(new) else ()

    def plan_checkpoint(self, table: BlockTable, num_tokens: int) -> None:
        """A step is planned after which so many tokens are computed: if it can be done, keep the state there."""
        if self.has_states and self._prefix_caching:
            for states in _states_of(table):
                states.plan_checkpoint(num_tokens, table.holder)

    def chunk_end(self, start: int, end: int, num_known: int) -> int:
        """Where a chunk that could end at `end` should, so that there is a checkpoint of all that is reusable."""
        if not (self.has_states and self._prefix_caching):
            return end
        last = (num_known - 1) // self.block_size * self.block_size
        boundary = min(end, last) // self.block_size * self.block_size
        return boundary if boundary > start else end

    # --- prompts computed by one engine for another

    def columns_behind(self, num_tokens: int, block_size: int | None = None) -> dict[int, range]:
        """Columns of each group but the first that tokens behind so many need; groups that need none are left out.

        `block_size`: of the engine whose columns are meant; None: of this one.
        """
        columns = {i: group.columns_behind(num_tokens, block_size) for i, group in enumerate(self._groups) if i}
        return {i: needed for i, needed in columns.items() if needed}

    def columns_with(self, group: int, columns: range, block_size: int, *, num_tokens: int) -> range:
        """Columns of this engine that share tokens with columns of another engine, of those that tokens behind
        `num_tokens` need."""
        found = self._groups[group].columns_with(columns, block_size)
        needed = self._groups[group].columns_behind(num_tokens)
        start = max(found.start, needed.start)
        return range(start, max(start, min(found.stop, needed.stop)))

    def missing_to_receive(self, table: BlockTable, num_tokens: int) -> tuple[int, ...]:
        """Pages of each group that the table, matched in the first group, lacks to receive so many tokens."""
        first = ceil_div(num_tokens, self.block_size) - len(table.block_ids)
        return (first, *(len(group.columns_behind(num_tokens)) for group in self._groups[1:]))

    def receive(self, table: BlockTable, num_tokens: int) -> bool:
        """Take what `missing_to_receive` counts. False, and nothing changed, if there are too few."""
        if not self.has_room(self.missing_to_receive(table, num_tokens)):
            return False
        for pages in self._pages_of(table):
            pages.receive(num_tokens, table.holder)
        return True

    def handed_over(self, table: BlockTable, group: int, columns: range) -> tuple[int, ...]:
        """Pages of a prompt that one engine publishes and another receives."""
        return table.groups[group].handed_over(columns)

    def trim(self, table: BlockTable) -> None:
        """Nothing more is computed with the table: give back what only that would need."""
        for states in _states_of(table):
            states.trim(table.holder)

    # --- holders

    def rename(self, table: BlockTable, holder: Holder) -> None:
        """Hold the table's pages under another kind."""
        for group, pages in zip(self._groups, table.groups):
            group.pool.change_holder(pages.held(), table.holder, holder)
        table.holder = holder

    def release(self, table: BlockTable) -> None:
        """Give all pages back; the table is empty afterwards."""
        for group, pages in zip(self._groups, table.groups):
            group.pool.release(pages.held(), table.holder)
        table.groups = []
        table.last_prefix, table.num_named = None, 0

    def _pages_of(self, table: BlockTable) -> list[GroupPages]:
        if not table.groups:
            table.groups = [group.new_pages(0) for group in self._groups]
        return table.groups

    # --- ledger

    @property
    def has_pages_elsewhere(self) -> bool:
        """Whether some page of a group but the first is held for another engine, and so comes back by itself."""
        counts = [group.pool.counts() for group in self._groups[1:]]
        return any(count["leased"] or count["arriving"] for count in counts)

    def other_counts(self) -> dict[str, dict[str, int]]:
        """Pages of every group but the first by state, by the group's name."""
        return {group.name: group.pool.counts_by_name() for group in self._groups[1:]}

    def check_integrity(self) -> None:
        """Raise AssertionError if some group's ledger is wrong. For tests; looks at every page."""
        for group in self._groups:
            group.pool.check_integrity()


def _states_of(table: BlockTable) -> list[StatePages]:
    return [pages for pages in table.groups if isinstance(pages, StatePages)]


def _check_size(group: PageGroup, *, max_chunk: int | None, max_drafts: int) -> None:
    """One request alone must be able to finish, whatever it needs."""
    if max_chunk is not None and max_chunk <= max_drafts:
        raise ConfigError(f"{group.num_pages} pages do not hold a window of {group.window} tokens: raise num_blocks")
    if group.kind == "state" and group.num_pages < max_drafts + 2:
        raise ConfigError(f"{group.num_pages} pages of states are too few for one request: raise num_blocks")
