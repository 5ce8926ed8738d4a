"""Parts of blocks, in bytes: what a read copies when the two sides lay out their blocks differently. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extent:
    """`count` runs of `num_bytes` of a block, from `offset` on, the next one `stride` bytes behind the one before."""

    offset: int
    num_bytes: int
    count: int = 1
    stride: int = 0

    @property
    def total_bytes(self) -> int:
        """Of all runs."""
        return self.num_bytes * self.count

    @property
    def stop(self) -> int:
        """Where the last run ends."""
        return self.offset + (self.count - 1) * self.stride + self.num_bytes

    def joined(self) -> Extent:
        """The same bytes as one run, if they lie without gaps."""
        is_dense = self.count == 1 or self.stride == self.num_bytes
        return Extent(self.offset, self.total_bytes) if is_dense else self

    def continues_in(self, other: Extent) -> bool:
        """Whether both are single runs, the other one right behind this one."""
        return self.count == other.count == 1 and self.stop == other.offset


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a block that is read into part of another one: as many runs of equal length on both sides."""

    remote: Extent
    local: Extent


@dataclass(frozen=True, slots=True)
class PeerShape:
    """What a peer's rank is expected to be when it differs from the rank that reads."""

    rank: int
    block_bytes: tuple[int, ...]
    """By cache group."""
