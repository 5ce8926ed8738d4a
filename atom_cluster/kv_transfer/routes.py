"""Which bytes of which peer's rank go where, between two engines that lay out the same KV differently. Pure.

Two engines of equal fingerprint may differ in their numbers of ranks and in their block sizes (`KvPlacement`). KV moves
in *units*: as many tokens as the smaller of both blocks has. So each unit is a whole block on one side, and one of
`num_phases` equal parts of a block on the other. For each phase a `Route` has the pieces of a block that one reading
rank gets from one exporting rank; both sides compute the same routes, the reader to read, the exporter to tag exactly
what will be read. What several exporting ranks have (latents, heads that are fewer than ranks) is read from those next
to the reader in proportion, part by part in turn, so that no rank serves all.
"""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from atom_cluster.errors import TransferError
from atom_cluster.kv_cache.page_map import PageMap, RowSection
from atom_cluster.kv_transfer.pieces import Extent, Piece
from atom_cluster.messages.transfer import KvPlacement

MAX_RANKS = 1024
MAX_BLOCK_SIZE = 1 << 16
_MAX_KNOWN = 256


@dataclass(frozen=True, slots=True)
class Route:
    """What one reading rank gets from one exporting rank, of each block."""

    source: int
    """The exporting rank."""
    pieces: tuple[tuple[Piece, ...] | None, ...]
    """By phase. None: whole blocks, which are equal on both sides. Empty: nothing."""


@dataclass(frozen=True, slots=True)
class Units:
    """How the blocks of two engines are made of units. Blocks and units are counted from the prompt's start."""

    per_remote_block: int
    per_local_block: int

    @property
    def num_phases(self) -> int:
        """Kinds of units, by where in the larger block they are; unit u is of phase `u % num_phases`."""
        return max(self.per_remote_block, self.per_local_block)

    def remote(self, first_block: int, num_blocks: int) -> range:
        """Units of blocks of the exporting side."""
        return range(first_block * self.per_remote_block, (first_block + num_blocks) * self.per_remote_block)

    def local(self, first_block: int, num_blocks: int) -> range:
        """Units of blocks of the reading side."""
        return range(first_block * self.per_local_block, (first_block + num_blocks) * self.per_local_block)


def check_placement(placement: KvPlacement, own: KvPlacement) -> None:
    """Raise `TransferError` for a placement that no engine has, or whose blocks cannot be exchanged with our own."""
    if not (0 < placement.block_size <= MAX_BLOCK_SIZE and 0 < placement.world_size <= MAX_RANKS):
        raise TransferError(f"no engine has blocks of {placement.block_size} tokens on {placement.world_size} ranks")
    sizes = placement.block_size, own.block_size
    if max(sizes) % min(sizes):
        raise TransferError(
            f"cache.block_size is {own.block_size} here and {placement.block_size} there: "
            "one must be a multiple of the other"
        )


def units_of(page_map: PageMap, *, source: KvPlacement, reader: KvPlacement) -> Units:
    """Units of a group's blocks. A state is one unit."""
    if page_map.is_state:
        return Units(1, 1)
    unit = min(source.block_size, reader.block_size)
    return Units(source.block_size // unit, reader.block_size // unit)


class RoutePlanner:
    """Routes of the cache groups of one model; remembers the last ones. Not thread-safe."""

    def __init__(self, maps: Sequence[PageMap]) -> None:
        self._maps = tuple(maps)
        self._known: OrderedDict[tuple[int, KvPlacement, KvPlacement, int], tuple[Route, ...]] = OrderedDict()

    @property
    def num_groups(self) -> int:
        """Cache groups."""
        return len(self._maps)

    def units(self, group: int, *, source: KvPlacement, reader: KvPlacement) -> Units:
        """See `units_of`."""
        return units_of(self._maps[group], source=source, reader=reader)

    def routes(self, group: int, *, source: KvPlacement, reader: KvPlacement, rank: int) -> tuple[Route, ...]:
        """All that rank `rank` of the reading side gets, in order of the exporting ranks.

        Raises `TransferError` for placements that do not fit each other.
        """
        key = (group, source, reader, rank)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = plan_routes(self._maps[group], source=source, reader=reader, rank=rank)
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return found


def plan_routes(page_map: PageMap, *, source: KvPlacement, reader: KvPlacement, rank: int) -> tuple[Route, ...]:
    """See `RoutePlanner.routes`."""
    check_placement(source, reader)
    if source == reader:
        return (Route(rank, (None,)),)
    num_phases = units_of(page_map, source=source, reader=reader).num_phases
    by_phase = [_pieces_by_source(page_map, source, reader, rank, phase) for phase in range(num_phases)]
    sources = sorted(set().union(*by_phase))
    return tuple(Route(rank_, tuple(pieces.get(rank_, ()) for pieces in by_phase)) for rank_ in sources)


def _pieces_by_source(
    page_map: PageMap, source: KvPlacement, reader: KvPlacement, rank: int, phase: int
) -> dict[int, tuple[Piece, ...] | None]:
    own_offsets = page_map.offsets(rank, reader.world_size, reader.block_size)
    offsets: dict[int, list[int]] = {}
    found: dict[int, list[Piece]] = {}
    nearest = _nearest(rank, reader.world_size, source.world_size)
    for index, part in enumerate(page_map.parts):
        remote_rows, local_rows = _rows(page_map, index, source, reader, phase)
        if not remote_rows:
            continue
        local_at = own_offsets[index] + local_rows.start * part.row_bytes(rank, reader.world_size)
        local_stride = part.row_bytes(rank, reader.world_size)
        turn = index / len(page_map.parts)
        for number, section in enumerate(part.sections):
            for peer, units in _holders(section, rank, reader.world_size, source.world_size, nearest, turn):
                if peer not in offsets:
                    offsets[peer] = page_map.offsets(peer, source.world_size, source.block_size)
                remote_stride = part.row_bytes(peer, source.world_size)
                remote_at = offsets[peer][index] + remote_rows.start * remote_stride
                before = part.sections[:number]
                remote_at += _bytes_before(before, section, units.start, peer, source.world_size)
                inside = _bytes_before(before, section, units.start, rank, reader.world_size)
                size, count = len(units) * section.unit_bytes, len(remote_rows)
                found.setdefault(peer, []).append(
                    Piece(
                        Extent(remote_at, size, count, remote_stride),
                        Extent(local_at + inside, size, count, local_stride),
                    )
                )
    return {
        peer: _whole_or(
            _merged(pieces), min(offsets[peer][-1], own_offsets[-1]), max(offsets[peer][-1], own_offsets[-1])
        )
        for peer, pieces in found.items()
    }


def _rows(page_map: PageMap, index: int, source: KvPlacement, reader: KvPlacement, phase: int) -> tuple[range, range]:
    """Rows of a unit in a page of either side, equally many."""
    part, unit = page_map.parts[index], min(source.block_size, reader.block_size)
    if page_map.is_state:
        return range(1), range(1)
    larger = max(source.block_size, reader.block_size)
    # The larger page tells which unit it is that ends a row of more tokens than a unit has.
    rows = part.rows_of(phase * unit, (phase + 1) * unit, larger)
    in_smaller = range(len(rows))
    return (rows, in_smaller) if source.block_size == larger else (in_smaller, rows)


def _nearest(rank: int, num_readers: int, num_sources: int) -> range:
    """Exporting ranks that a reading rank prefers: its share of them, or the one it shares with its neighbours."""
    first = rank * num_sources // num_readers
    return range(first, max(first + 1, (rank + 1) * num_sources // num_readers))


def _holders(
    section: RowSection, rank: int, num_readers: int, num_sources: int, nearest: range, turn: float
) -> Iterator[tuple[int, range]]:
    """Who to read which of the section's units from. `turn`, in [0, 1): whose turn it is among equals."""
    wanted = section.share(rank, num_readers)
    shares = [section.share(peer, num_sources) for peer in range(num_sources)]
    cuts = sorted({wanted.start, wanted.stop, *(at for share in shares for at in (share.start, share.stop))})
    cuts = cuts[bisect.bisect_left(cuts, wanted.start) : bisect.bisect_right(cuts, wanted.stop)]
    for start, stop in zip(cuts, cuts[1:]):
        able = [peer for peer, share in enumerate(shares) if share.start <= start and stop <= share.stop]
        preferred = [peer for peer in able if peer in nearest] or able
        yield preferred[math.floor(turn * len(preferred))], range(start, stop)


def _bytes_before(earlier: Sequence[RowSection], section: RowSection, unit: int, rank: int, world_size: int) -> int:
    """Where a unit of a section begins in the rank's row."""
    before = sum(len(other.share(rank, world_size)) * other.unit_bytes for other in earlier)
    return before + (unit - section.share(rank, world_size).start) * section.unit_bytes


def _merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The same bytes in the same order, in as few pieces as neighbours can be put together."""
    merged: list[Piece] = []
    for piece in pieces:
        remote, local = piece.remote.joined(), piece.local.joined()
        if remote.count != local.count:
            remote, local = piece.remote, piece.local
        last = merged[-1] if merged else None
        if last is not None and last.remote.continues_in(remote) and last.local.continues_in(local):
            size = last.remote.num_bytes + remote.num_bytes
            merged[-1] = Piece(Extent(last.remote.offset, size), Extent(last.local.offset, size))
        else:
            merged.append(Piece(remote, local))
    return tuple(merged)


def _whole_or(pieces: tuple[Piece, ...], smaller: int, larger: int) -> tuple[Piece, ...] | None:
    """None if the pieces are whole pages of equal content: of which padding may be copied too."""
    whole = Extent(0, smaller)
    return None if smaller == larger and pieces == (Piece(whole, whole),) else pieces
