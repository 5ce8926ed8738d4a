"""One `ReadBlocks` of an engine as reads of a transport, and the tags that each side has for them. Starts nothing."""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.checksum import BlockTagger
from atom_cluster.kv_transfer.pieces import Extent, Piece
from atom_cluster.kv_transfer.routes import RoutePlanner, Units
from atom_cluster.messages.transfer import KvPlacement, ReadBlocks, TagBlocks


@dataclass(frozen=True, slots=True)
class Part:
    """One read of a transport."""

    source: int
    """Rank of the peer."""
    remote_blocks: tuple[int, ...]
    local_blocks: tuple[int, ...]
    pieces: tuple[Piece, ...] | None
    """None: whole blocks."""
    tags: tuple[int, ...]
    """Expected, one per block; empty when nothing is to be checked."""

    @property
    def local_extents(self) -> tuple[Extent, ...] | None:
        """What is written of each local block."""
        return None if self.pieces is None else tuple(piece.local for piece in self.pieces)


def parts_of_read(
    command: ReadBlocks, planner: RoutePlanner, *, source: KvPlacement, own: KvPlacement, rank: int
) -> list[Part]:
    """The reads of rank `rank`. Raises `TransferError` for a command that cannot be carried out."""
    if not 0 <= command.group < planner.num_groups:
        raise TransferError(f"there is no group {command.group}")
    if len(set(command.local_block_ids)) != len(command.local_block_ids):
        raise TransferError("local blocks must be distinct")
    routes = planner.routes(command.group, source=source, reader=own, rank=rank)
    units = planner.units(command.group, source=source, reader=own)
    remote = units.remote(command.first_remote_block, len(command.remote_block_ids))
    local = units.local(command.first_local_block, len(command.local_block_ids))
    if units.num_phases == 1 and len(remote) != len(local):
        raise TransferError("local blocks must be as many as remote ones")
    expected = _expected(command, rank, len(routes) * len(remote))
    parts = []
    for number, route in enumerate(routes):
        for phase, pieces in enumerate(route.pieces):
            common = _of_phase(range(max(remote.start, local.start), min(remote.stop, local.stop)), phase, units)
            if pieces == () or not common:
                continue
            parts.append(
                Part(
                    route.source,
                    _holders(command.remote_block_ids, common, remote.start, units.per_remote_block),
                    _holders(command.local_block_ids, common, local.start, units.per_local_block),
                    pieces,
                    _items(expected, common, remote.start - number * len(remote)) if expected else (),
                )
            )
    return parts


def tags_for_reader(
    command: TagBlocks, planner: RoutePlanner, tagger: BlockTagger, *, own: KvPlacement, rank: int
) -> tuple[tuple[int, ...], ...]:
    """Tags of what each rank of the reader will read from this rank, as `KvPublication.tags` orders them."""
    units = planner.units(command.group, source=own, reader=command.reader)
    first = units.remote(command.first_block, len(command.block_ids))
    known: dict[tuple[int, tuple[Extent, ...] | None], tuple[int, ...]] = {}
    tags: list[tuple[int, ...]] = []
    for reader_rank in range(command.reader.world_size):
        routes = planner.routes(command.group, source=own, reader=command.reader, rank=reader_rank)
        pieces_by_phase = next((route.pieces for route in routes if route.source == rank), ())
        of_reader = [0] * (len(first) if pieces_by_phase else 0)
        for phase, pieces in enumerate(pieces_by_phase):
            of_phase = _of_phase(first, phase, units)
            blocks = [command.block_ids[(u - first.start) // units.per_remote_block] for u in of_phase]
            extents = None if pieces is None else tuple(piece.remote for piece in pieces)
            key = (phase, extents)  # readers of the same, such as latents, share the work
            if key not in known:
                known[key] = tagger.tags(command.group, blocks, command.epoch, extents)
            for unit, tag in zip(of_phase, known[key]):
                of_reader[unit - first.start] = tag
        tags.append(tuple(of_reader))
    return tuple(tags)


def _expected(command: ReadBlocks, rank: int, num_tags: int) -> tuple[int, ...]:
    if not command.tags:
        return ()
    if len(command.tags) <= rank or len(command.tags[rank]) != num_tags:
        raise TransferError(f"there is not one tag per block for rank {rank}")
    return command.tags[rank]


def _holders(block_ids: tuple[int, ...], units_range: range, start: int, per_block: int) -> tuple[int, ...]:
    """The block that each of these units is in, if the first one's units begin with `start`."""
    if per_block == 1:
        return _items(block_ids, units_range, start)
    return tuple(block_ids[(unit - start) // per_block] for unit in units_range)


def _items(items: tuple[int, ...], units_range: range, start: int) -> tuple[int, ...]:
    """Those of these units, if the first one is of unit `start`."""
    return items[units_range.start - start : units_range.stop - start : units_range.step]


def _of_phase(units_range: range, phase: int, units: Units) -> range:
    """Those of one phase."""
    start = units_range.start + (phase - units_range.start) % units.num_phases
    return range(start, max(start, units_range.stop), units.num_phases)
