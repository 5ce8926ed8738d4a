"""Cards, queries and a model of an engine's prefix cache for the routing tests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    MemberCard,
    PeerAddress,
    ReplicaLoad,
    Role,
    RouteQuery,
)

BLOCK_SIZE = 16


def make_card(
    peer_id: str, role: Role = "unified", *, fingerprint: str = "f", epoch: int = 1, is_draining: bool = False
) -> MemberCard:
    return MemberCard(
        address=PeerAddress(peer_id=peer_id, endpoint=f"tcp://127.0.0.1/{peer_id}", epoch=epoch),
        kind="engine",
        role=role,
        fingerprint=fingerprint,
        num_blocks=1000,
        block_size=BLOCK_SIZE,
        is_draining=is_draining,
    )


def make_query(
    hashes: Sequence[int] = (),
    *,
    query_id: int = 1,
    num_tokens: int | None = None,
    output: int = 100,
    excluded: tuple[str, ...] = (),
) -> RouteQuery:
    return RouteQuery(
        query_id=query_id,
        block_hashes=(tuple(hashes),),
        num_tokens=len(hashes) * BLOCK_SIZE + 1 if num_tokens is None else num_tokens,
        expected_output_tokens=output,
        excluded=excluded,
    )


def make_load(
    peer_id: str, *, running: int = 0, waiting_tokens: int = 0, free_blocks: int = 1000, epoch: int = 1
) -> ReplicaLoad:
    return ReplicaLoad(
        peer_id=peer_id,
        epoch=epoch,
        num_running=running,
        num_waiting=0,
        num_waiting_tokens=waiting_tokens,
        num_free_blocks=free_blocks,
        num_blocks=1000,
    )


class CacheModel:
    """What a real engine's prefix cache does: LRU over blocks, one event per block that enters or leaves."""

    def __init__(self, peer_id: str, capacity: int, epoch: int = 1) -> None:
        self.peer_id = peer_id
        self.epoch = epoch
        self._capacity = capacity
        self._next_seq = 0
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def leading_run(self, hashes: Sequence[int]) -> int:
        for position, block_hash in enumerate(hashes):
            if block_hash not in self._blocks:
                return position
        return len(hashes)

    def use(self, hashes: Sequence[int]) -> CacheEvents:
        """Compute a prompt: its blocks are cached, heads of chains are evicted last."""
        stored = [block_hash for block_hash in hashes if block_hash not in self._blocks]
        for block_hash in reversed(hashes):
            self._blocks[block_hash] = None
            self._blocks.move_to_end(block_hash)
        removed = []
        while len(self._blocks) > self._capacity:
            removed.append(self._blocks.popitem(last=False)[0])
        return self._events(stored, removed)

    def evict(self, count: int) -> CacheEvents:
        removed = [self._blocks.popitem(last=False)[0] for _ in range(min(count, len(self._blocks)))]
        return self._events([], removed)

    def _events(self, stored: list[int], removed: list[int]) -> CacheEvents:
        first_seq = self._next_seq
        self._next_seq += len(stored) + len(removed)
        return CacheEvents(
            peer_id=self.peer_id, epoch=self.epoch, first_seq=first_seq, stored=tuple(stored), removed=tuple(removed)
        )

    def snapshot(self) -> CacheSnapshot:
        return CacheSnapshot(
            peer_id=self.peer_id, epoch=self.epoch, next_seq=self._next_seq, hashes=tuple(self._blocks)
        )
