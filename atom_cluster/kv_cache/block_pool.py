"""BlockPool: KV blocks, who holds them, and which prefix each may be reused for. Ids and counts, no tensors.

There is one pool per cache group; what is called a block here is a page of it.

Every block is in exactly one state. Holders are counted per kind, and the state follows from the counts:

    arriving   a read from another engine writes it
    running    a request of this engine computes with it
    leased     published under a ticket; another engine may read it
    cached     nobody holds it; its KV is kept for reuse, least recently used goes first
    free       nobody holds it and nothing in it matters

A block with several holders takes the first of these states that applies. Whoever acquires a block releases it, under
the same kind, exactly once. Knows nothing of requests and of what a token is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Holder = Literal["arriving", "running", "leased"]
BlockState = Literal["arriving", "running", "leased", "cached", "free"]

STATES: tuple[BlockState, ...] = ("free", "cached", "running", "leased", "arriving")
_HOLDERS: tuple[Holder, ...] = ("arriving", "running", "leased")


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A prompt prefix that ends with a full block: its tokens, after those of `parent`."""

    hash: int
    tokens: bytes
    """Of the last block, packed as `prefix_hash.pack_tokens` does."""
    parent: Prefix | None

    def equals(self, other: Prefix | None) -> bool:
        """Whether both are the same tokens from the very first one on; hashes prove nothing."""
        mine: Prefix | None = self
        while mine is not other:
            if mine is None or other is None or mine.tokens != other.tokens:
                return False
            mine, other = mine.parent, other.parent
        return True


@dataclass(slots=True)
class _Block:
    holders: dict[Holder, int] = field(default_factory=lambda: dict.fromkeys(_HOLDERS, 0))
    prefix: Prefix | None = None

    def state(self) -> BlockState:
        for holder in _HOLDERS:
            if self.holders[holder]:
                return holder
        return "free" if self.prefix is None else "cached"


class BlockPool:
    """All KV blocks of one engine. Not thread-safe."""

    def __init__(self, num_blocks: int) -> None:
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._idle_cached: OrderedDict[int, None] = OrderedDict()
        self._block_by_hash: dict[int, int] = {}
        self._counts: dict[BlockState, int] = dict.fromkeys(STATES, 0)
        self._counts["free"] = num_blocks
        self._changes: dict[int, bool] = {}
        self._num_events = 0

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return len(self._blocks)

    @property
    def num_available(self) -> int:
        """Blocks that `acquire` could hand out now: free ones and idle cached ones."""
        return len(self._free) + len(self._idle_cached)

    def acquire(self, num_blocks: int, holder: Holder) -> list[int] | None:
        """Empty blocks, evicting cached ones as needed; None, and nothing changed, if there are too few."""
        if num_blocks > self.num_available:
            return None
        return [self._take(holder) for _ in range(num_blocks)]

    def _take(self, holder: Holder) -> int:
        if self._free:
            block_id = self._free.popleft()
        else:
            block_id, _ = self._idle_cached.popitem(last=False)
            self._forget(block_id)
        self._add(block_id, holder, 1)
        return block_id

    def _add(self, block_id: int, holder: Holder, change: int) -> BlockState:
        """Change the number of holders of a kind; returns the state that follows."""
        block = self._blocks[block_id]
        self._counts[block.state()] -= 1
        block.holders[holder] += change
        state = block.state()
        self._counts[state] += 1
        return state

    def share(self, block_id: int, holder: Holder) -> None:
        """One more holder of a block that is cached or held."""
        if self._blocks[block_id].state() == "free":
            raise AssertionError(f"block {block_id} is free; it can be acquired, not shared")
        self._idle_cached.pop(block_id, None)
        self._add(block_id, holder, 1)

    def release(self, block_ids: Iterable[int], holder: Holder) -> None:
        """Give up what was acquired or shared. Of blocks released together the last is evicted first."""
        for block_id in reversed(tuple(block_ids)):
            self._check_held(block_id, holder)
            state = self._add(block_id, holder, -1)
            if state == "free":
                self._free.append(block_id)
            elif state == "cached":
                self._idle_cached[block_id] = None

    def change_holder(self, block_ids: Iterable[int], old: Holder, new: Holder) -> None:
        """The same claim under another kind."""
        for block_id in block_ids:
            self._check_held(block_id, old)
            self._add(block_id, new, 1)
            self._add(block_id, old, -1)

    def _check_held(self, block_id: int, holder: Holder) -> None:
        if not self._blocks[block_id].holders[holder]:
            raise AssertionError(f"block {block_id} is not {holder}")

    # --- prefix cache

    def find(self, prefix_hash: int, tokens: bytes, parent: Prefix | None) -> tuple[int, Prefix] | None:
        """The block that holds this very prefix, if any."""
        block_id = self._block_by_hash.get(prefix_hash)
        if block_id is None:
            return None
        prefix = self._blocks[block_id].prefix
        if prefix is None or not prefix.equals(Prefix(prefix_hash, tokens, parent)):
            return None
        return block_id, prefix

    def cache(self, block_id: int, prefix: Prefix) -> None:
        """Keep a held block's KV for reuse. Without effect when another block has the prefix, or its hash, already."""
        block = self._blocks[block_id]
        if prefix.hash in self._block_by_hash or block.prefix is not None:
            return
        if not any(block.holders.values()):
            raise AssertionError(f"block {block_id} is cached before it is released, not after")
        block.prefix = prefix
        self._block_by_hash[prefix.hash] = block_id
        self._note(prefix.hash, is_stored=True)

    def forget_idle(self, block_id: int, prefix: Prefix) -> None:
        """Free a cached block that nobody holds, unless it has been put to another use since it got this prefix."""
        if block_id in self._idle_cached and self._blocks[block_id].prefix is prefix:
            del self._idle_cached[block_id]
            self._forget(block_id)
            self._free.append(block_id)

    def _forget(self, block_id: int) -> None:
        prefix = self._blocks[block_id].prefix
        if prefix is None:
            raise AssertionError(f"block {block_id} is not cached")
        self._blocks[block_id].prefix = None
        self._counts["cached"] -= 1
        self._counts["free"] += 1
        del self._block_by_hash[prefix.hash]
        self._note(prefix.hash, is_stored=False)

    def _note(self, prefix_hash: int, *, is_stored: bool) -> None:
        # A hash that came and went, or went and came, since the last events is no news.
        if prefix_hash in self._changes:
            del self._changes[prefix_hash]
        else:
            self._changes[prefix_hash] = is_stored

    def take_changes(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Hashes that became findable and that ceased to be, since the last call, after the number of earlier ones."""
        first = self._num_events
        stored = tuple(prefix_hash for prefix_hash, is_stored in self._changes.items() if is_stored)
        removed = tuple(prefix_hash for prefix_hash, is_stored in self._changes.items() if not is_stored)
        self._num_events += len(self._changes)
        self._changes.clear()
        return first, stored, removed

    @property
    def num_events(self) -> int:
        """Changes taken so far."""
        return self._num_events

    @property
    def cached_hashes(self) -> tuple[int, ...]:
        """Hashes of all prefixes that can be found."""
        return tuple(self._block_by_hash)

    @property
    def num_findable(self) -> int:
        """How many those are."""
        return len(self._block_by_hash)

    # --- ledger

    def counts(self) -> dict[BlockState, int]:
        """Blocks by state; they add up to `num_blocks`."""
        return dict(self._counts)

    def counts_by_name(self) -> dict[str, int]:
        """The same with plain strings, for messages."""
        return {str(state): count for state, count in self._counts.items()}

    def check_integrity(self) -> None:
        """Raise AssertionError if counts, lists and blocks disagree. For tests; looks at every block."""
        counts: dict[BlockState, int] = dict.fromkeys(STATES, 0)
        for block_id, block in enumerate(self._blocks):
            state = block.state()
            counts[state] += 1
            assert all(count >= 0 for count in block.holders.values()), f"block {block_id} was released too often"
            assert (block_id in self._idle_cached) == (state == "cached"), f"block {block_id} is {state}"
            if block.prefix is not None:
                assert self._block_by_hash.get(block.prefix.hash) == block_id, f"block {block_id} cannot be found"
        free = set(self._free)
        assert len(free) == len(self._free) == counts["free"], "a free block is listed twice or not at all"
        assert all(self._blocks[block_id].state() == "free" for block_id in free), "a listed block is not free"
        assert counts == self._counts, f"counted {self._counts}, found {counts}"
        assert len(self._block_by_hash) == sum(block.prefix is not None for block in self._blocks)
