"""PrefixIndex: which replica has which blocks in its prefix cache, as far as the replicas' events told.

One set of 64-bit block hashes per replica. Events carry sequence numbers: after a hole the index goes on with what it
has and says that a snapshot is needed. Which incarnation (epoch) of a replica counts is decided by the caller, through
`track`; messages of another one are ignored. A wrong entry costs a wasted prefill, never a wrong answer, because
engines compare tokens on a hit. Knows nothing of load, of tokens or of how messages arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from atom_cluster.messages.cluster import CacheEvents, CacheSnapshot

Applied = Literal["applied", "gap", "ignored"]
"""applied: the entry is exact again. gap: something was lost, a snapshot is needed. ignored: not a tracked epoch."""


class _ReplicaBlocks:
    """Hashes of one replica in two disjoint generations, so that the least recently used half is forgotten in O(1).

    A hash is in the younger generation from when it is stored or asked for. Once that one is full, the older one, which
    nobody touched in the meantime, is dropped and the younger one takes its place. So a prefix in use is kept whole,
    whereas dropping the oldest hashes first would cut off the heads of the chains.
    """

    __slots__ = ("epoch", "is_exact", "next_seq", "older", "younger")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.next_seq = 0
        self.is_exact = False
        self.younger: set[int] = set()
        self.older: set[int] = set()

    def __len__(self) -> int:
        return len(self.younger) + len(self.older)

    def store(self, hashes: Sequence[int], generation_size: int) -> None:
        for start in range(0, len(hashes), generation_size):
            part = hashes[start : start + generation_size]
            if len(self.younger) + len(part) > generation_size:
                self.older = self.younger
                self.younger = set()
            self.older.difference_update(part)
            self.younger.update(part)

    def remove(self, hashes: Sequence[int]) -> None:
        self.younger.difference_update(hashes)
        self.older.difference_update(hashes)

    def leading_run(self, hashes: Sequence[int], generation_size: int) -> int:
        younger, older = self.younger, self.older
        length = 0
        for block_hash in hashes:
            if block_hash not in younger and block_hash not in older:
                break
            length += 1
        if older:
            self.store([block_hash for block_hash in hashes[:length] if block_hash in older], generation_size)
        return length


class PrefixIndex:
    """Block hashes by replica, at most `max_blocks` (replica, block) entries, an equal share for each replica."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._blocks_by_peer: dict[str, _ReplicaBlocks] = {}

    @property
    def num_entries(self) -> int:
        """(replica, block) pairs held."""
        return sum(map(len, self._blocks_by_peer.values()))

    def num_blocks(self, peer_id: str) -> int:
        """Blocks known to be cached on a replica; 0 for one that is not tracked."""
        blocks = self._blocks_by_peer.get(peer_id)
        return 0 if blocks is None else len(blocks)

    def track(self, peer_id: str, epoch: int) -> None:
        """Listen to this incarnation of a replica, from now on only to it. Idempotent; a new epoch starts empty."""
        known = self._blocks_by_peer.get(peer_id)
        if known is not None and known.epoch == epoch:
            return
        self._blocks_by_peer[peer_id] = _ReplicaBlocks(epoch)
        share = self._max_blocks // len(self._blocks_by_peer)
        for blocks in self._blocks_by_peer.values():
            if len(blocks) > share:
                blocks.older = set()

    def forget(self, peer_id: str) -> None:
        """Drop a replica and all its entries. Unknown ones are ignored."""
        self._blocks_by_peer.pop(peer_id, None)

    def needs_snapshot(self, peer_id: str) -> bool:
        """Whether the replica is tracked and events of it are missing."""
        blocks = self._blocks_by_peer.get(peer_id)
        return blocks is not None and not blocks.is_exact

    def apply_events(self, events: CacheEvents) -> Applied:
        """Take in events in order. Those already known, from a snapshot or a repetition, are skipped."""
        blocks = self._blocks_by_peer.get(events.peer_id)
        if blocks is None or blocks.epoch != events.epoch:
            return "ignored"
        num_events = len(events.stored) + len(events.removed)
        num_known = min(max(0, blocks.next_seq - events.first_seq), num_events)
        if events.first_seq > blocks.next_seq:
            blocks.is_exact = False
        elif events.first_seq == 0 and blocks.next_seq == 0:
            blocks.is_exact = True
        blocks.store(events.stored[num_known:], self._generation_size)
        blocks.remove(events.removed[max(0, num_known - len(events.stored)) :])
        blocks.next_seq = max(blocks.next_seq, events.first_seq + num_events)
        return "applied" if blocks.is_exact else "gap"

    def apply_snapshot(self, snapshot: CacheSnapshot) -> Applied:
        """Replace a replica's entries. A snapshot older than the events seen since is not enough: "gap"."""
        blocks = self._blocks_by_peer.get(snapshot.peer_id)
        if blocks is None or blocks.epoch != snapshot.epoch:
            return "ignored"
        if snapshot.next_seq < blocks.next_seq:
            return "applied" if blocks.is_exact else "gap"
        blocks.younger, blocks.older = set(), set()
        blocks.store(snapshot.hashes, self._generation_size)
        blocks.next_seq = snapshot.next_seq
        blocks.is_exact = True
        return "applied"

    def matched_blocks(self, hashes: Sequence[int]) -> dict[str, int]:
        """Longest leading run of `hashes` that each replica has; replicas with none are absent."""
        if not hashes:
            return {}
        size = self._generation_size
        runs = ((peer_id, blocks.leading_run(hashes, size)) for peer_id, blocks in self._blocks_by_peer.items())
        return {peer_id: length for peer_id, length in runs if length}

    @property
    def _generation_size(self) -> int:
        return max(1, self._max_blocks // (2 * max(1, len(self._blocks_by_peer))))
