"""Random traces against a model that compares whole token tuples, with real hashes and with ones that collide."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from atom_cluster.kv_cache import block_manager, prefix_hash
from atom_cluster.kv_cache.block_manager import BlockManager, BlockTable
from atom_cluster.kv_cache.block_pool import STATES, Holder

BLOCK_SIZE = 2
SEED = prefix_hash.seed_of("model")
Tokens = tuple[int, ...]

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)
holders = st.sampled_from(["running", "leased", "arriving"])


@dataclass
class Request:
    """A table, and what the model knows of it."""

    table: BlockTable
    tokens: Tokens
    blocks: list[int]
    num_named: int
    num_computed: int = 0


@dataclass
class Model:
    """What a pool must do, told in plain lists."""

    free: list[int]
    idle: list[int] = field(default_factory=list)
    """Least recently used first."""
    cached: dict[int, tuple[int, Tokens]] = field(default_factory=dict)
    """By hash: block, and all tokens up to its end."""
    num_holders: Counter[int] = field(default_factory=Counter)

    def hold(self, block: int) -> None:
        if block in self.idle:
            self.idle.remove(block)
        self.num_holders[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.num_holders[block] -= 1
            if not self.num_holders[block]:
                (self.idle if self.is_cached(block) else self.free).append(block)

    def is_cached(self, block: int) -> bool:
        return any(block == other for other, _ in self.cached.values())

    def acquire(self, num_blocks: int) -> list[int] | None:
        if num_blocks > len(self.free) + len(self.idle):
            return None
        taken = [self.free.pop(0) if self.free else self.idle.pop(0) for _ in range(num_blocks)]
        self.cached = {name: entry for name, entry in self.cached.items() if entry[0] not in taken}
        for block in taken:
            self.hold(block)
        return taken


class Traces(RuleBasedStateMachine):
    """Requests come, find blocks, grow, compute, change hands and go."""

    num_hashes = 2**64

    def __init__(self) -> None:
        super().__init__()
        self.patch = patch.object(block_manager, "hash_block", self.hash_block)
        self.patch.start()
        self.requests: list[Request] = []
        self.told: set[int] = set()
        self.num_told = 0

    def teardown(self) -> None:
        self.patch.stop()

    def hash_block(self, parent: int, packed: bytes) -> int:
        return prefix_hash.hash_block(parent, packed) % self.num_hashes

    def hash_of(self, tokens: Tokens) -> int:
        """Hash of the last block of these tokens, of which there are a whole number of blocks."""
        parent = SEED
        for start in range(0, len(tokens), BLOCK_SIZE):
            parent = self.hash_block(parent, prefix_hash.pack_tokens(tokens[start : start + BLOCK_SIZE]))
        return parent

    def expected(self, prompt: Tokens) -> list[int]:
        blocks: list[int] = []
        for end in range(BLOCK_SIZE, len(prompt), BLOCK_SIZE):
            block, tokens = self.model.cached.get(self.hash_of(prompt[:end]), (-1, ()))
            if tokens != prompt[:end]:
                break
            blocks.append(block)
        return blocks

    def pick(self, data: st.DataObject) -> Request:
        return data.draw(st.sampled_from(self.requests))

    @initialize(num_blocks=st.integers(2, 9))
    def begin(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, seed=SEED, prefix_caching=True)
        self.model = Model(list(range(num_blocks)))

    @rule(prompt=prompts, holder=holders)
    def arrive(self, prompt: Tokens, holder: Holder) -> None:
        blocks = self.expected(prompt)
        table = self.manager.match(prompt, holder)
        assert table.block_ids == blocks
        for block in blocks:
            self.model.hold(block)
        num_cached = len(blocks) * BLOCK_SIZE
        self.requests.append(Request(table, prompt, list(blocks), len(blocks), num_cached))

    @rule(prompt=prompts)
    def ask_what_is_cached(self, prompt: Tokens) -> None:
        blocks = self.expected(prompt)
        assert self.manager.count_matching(prompt) == len(blocks) * BLOCK_SIZE
        for block in blocks:
            self.model.hold(block)
        self.model.release(blocks)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), new_tokens=st.lists(st.integers(0, 1), max_size=3).map(tuple))
    def grow(self, data: st.DataObject, new_tokens: Tokens) -> None:
        request = self.pick(data)
        tokens = request.tokens + new_tokens
        missing = max(0, -(-len(tokens) // BLOCK_SIZE) - len(request.blocks))
        assert self.manager.missing(request.table, len(tokens)) == (missing,)
        blocks = self.model.acquire(missing)
        found = self.manager.extend(request.table, len(tokens))
        if blocks is None:
            assert found is None
        else:
            assert found == ((tuple(blocks),) if blocks else ())
            request.blocks += blocks
            request.tokens = tokens
        assert request.table.block_ids == request.blocks

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        request = self.pick(data)
        room = min(len(request.tokens), len(request.blocks) * BLOCK_SIZE)
        request.num_computed = data.draw(st.integers(min(request.num_computed, room), room))
        self.manager.confirm(request.table, request.tokens, request.num_computed)
        for index in range(request.num_named, request.num_computed // BLOCK_SIZE):
            tokens = request.tokens[: (index + 1) * BLOCK_SIZE]
            self.model.cached.setdefault(self.hash_of(tokens), (request.blocks[index], tokens))
            request.num_named += 1
        assert request.table.num_named == request.num_named

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), holder=holders)
    def change_hands(self, data: st.DataObject, holder: Holder) -> None:
        self.manager.rename(self.pick(data).table, holder)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = self.pick(data)
        self.requests.remove(request)
        self.manager.release(request.table)
        self.model.release(request.blocks)

    @rule()
    def tell(self) -> None:
        first, stored, removed = self.manager.pool.take_changes()
        assert first == self.num_told
        self.num_told += len(stored) + len(removed)
        assert self.manager.pool.num_events == self.num_told
        assert not self.told & set(stored)
        assert self.told >= set(removed)
        self.told = (self.told | set(stored)) - set(removed)
        assert self.told == set(self.manager.pool.cached_hashes)

    @invariant()
    def all_is_accounted_for(self) -> None:
        pool = self.manager.pool
        pool.check_integrity()
        counts = pool.counts()
        assert tuple(counts) == STATES
        assert sum(counts.values()) == pool.num_blocks
        assert (counts["free"], counts["cached"]) == (len(self.model.free), len(self.model.idle))
        assert pool.num_available == len(self.model.free) + len(self.model.idle)
        kinds: dict[int, set[Holder]] = {}
        for request in self.requests:
            for block in request.table.block_ids:
                kinds.setdefault(block, set()).add(request.table.holder)
        for state in ("arriving", "running", "leased"):
            in_state = [block for block, found in kinds.items() if state in found]
            assert counts[state] == len(in_state)
            kinds = {block: found for block, found in kinds.items() if state not in found}
        assert set(pool.cached_hashes) == set(self.model.cached)


class CollidingTraces(Traces):
    """Three hashes for all prefixes there are."""

    num_hashes = 3


TestTraces = Traces.TestCase
TestTraces.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCollidingTraces = CollidingTraces.TestCase
TestCollidingTraces.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
