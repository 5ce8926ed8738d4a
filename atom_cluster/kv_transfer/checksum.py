"""A 64-bit content tag per KV block, the same on any device, so that a reader can tell a wrong block from a right one.

A block, or what is read of it, is taken as a sequence of 64-bit words, the last one filled up with zeros. Its tag is
`sum(word[i] * weight[i]) mod 2^64`, with fixed pseudo-random odd weights, mixed with the exporting engine's epoch. An
odd weight is invertible modulo 2^64, so a change of any single word always changes the tag; unrelated changes go
unnoticed with probability 2^-64 or little more. It guards against mistakes (stale, torn, misplaced or damaged blocks),
not against a forger.

Of parts of blocks the sequence is what both sides have in common, whatever else their blocks hold: extents one after
the other. So a reader can check what it reads from a rank that splits KV in another way, by itself and as it comes.
Sums over whole blocks could only be compared after those of all ranks were added up, and not at all where several ranks
hold the same or a reader has part of the block already.

Knows nothing of transports or tickets.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.pieces import Extent
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.regions import (
    adjacent_runs,
    byte_rows,
    check_blocks,
    check_extents,
    packed_bytes,
    packed_pairs,
    shape_of,
)
from atom_cluster.units import ceil_div

WordArray = npt.NDArray[np.uint64]

WORD_BYTES = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WEIGHTS_SEED = 0x61746F6D5F6B7631
_DEVICE_CHUNK_BYTES = 64 << 20
_HOST_CHUNK_BYTES = 1 << 20
_MAX_KNOWN_EXTENTS = 32
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BlockTagger:
    """Computes the tags of blocks of one rank's cache groups."""

    def __init__(self, regions: Sequence[KvRegion]) -> None:
        """Raises `TransferError` when a region's blocks are not a whole number of aligned 64-bit words."""
        self._shapes = [shape_of(region) for region in regions]
        self._words = [_word_rows(region) for region in regions]
        self._device = self._words[0].device
        self._is_host = self._device.type == "cpu"
        if not self._is_host:
            _prepare(self._device)
        self._all_weights: torch.Tensor | None = None
        self._elements: OrderedDict[tuple[int, tuple[Extent, ...]], torch.Tensor] = OrderedDict()
        """Where the elements of extents are in a block of a group, for the last ones asked for."""

    @property
    def _weights(self) -> torch.Tensor:
        """For the largest block. Made when first needed: who never checks anything spends nothing on it."""
        if self._all_weights is None:
            self._all_weights = odd_weights(max(words.shape[1] for words in self._words)).to(self._device)
        return self._all_weights

    def tags(
        self, group: int, block_ids: Sequence[int], epoch: int, extents: Sequence[Extent] | None = None
    ) -> tuple[int, ...]:
        """One tag in [0, 2^64) per block, of all of it or of these extents one after the other.

        Waits for the device. Raises `TransferError` for a block or extent out of range.
        """
        check_blocks(self._shapes, group, block_ids, whose="tagged")
        if not block_ids:
            return ()
        if extents == ():
            return _tags(torch.zeros(len(block_ids), dtype=torch.int64), epoch)
        words = self._words[group]
        sums = self._sums(words, block_ids) if extents is None else self._part_sums(group, block_ids, tuple(extents))
        return _tags(sums, epoch)

    def _part_sums(self, group: int, block_ids: Sequence[int], extents: tuple[Extent, ...]) -> torch.Tensor:
        """As `_sums`, of extents."""
        check_extents(extents, self._shapes[group].block_bytes)
        words = self._words[group]
        if not self._is_host and _width(extents) == WORD_BYTES:
            return self._device_sums(words, block_ids, self._elements_of(group, extents))
        num_bytes = packed_bytes(extents)
        num_words = ceil_div(num_bytes, WORD_BYTES)
        chunk = max(1, (_HOST_CHUNK_BYTES if self._is_host else _DEVICE_CHUNK_BYTES) // (num_words * WORD_BYTES))
        sums = []
        for first in range(0, len(block_ids), chunk):
            ids = block_ids[first : first + chunk]
            # Put together in a buffer, some blocks at a time.
            packed = torch.zeros(len(ids), num_words * WORD_BYTES, dtype=torch.uint8, device=self._device)
            if self._is_host:
                rows = words.view(torch.uint8).numpy()
                for memory, target in packed_pairs(rows, ids, extents, packed.numpy()):
                    np.copyto(target, memory)
            else:
                elements = words.view(_INTEGERS[_width(extents)])
                places = self._elements_of(group, extents)
                packed[:, :num_bytes] = elements[self._on_device(ids)[:, None], places].view(torch.uint8)
            sums.append(self._sums(packed.view(torch.int64), range(len(ids))))
        return torch.cat(sums)

    def _elements_of(self, group: int, extents: tuple[Extent, ...]) -> torch.Tensor:
        """Places of the elements in a block, which are as wide as all extents allow; int64 [elements]."""
        key = (group, extents)
        if key not in self._elements:
            width = _width(extents)
            runs = [
                torch.arange((e.offset + i * e.stride) // width, (e.offset + i * e.stride + e.num_bytes) // width)
                for e in extents
                for i in range(e.count)
            ]
            self._elements[key] = torch.cat(runs).to(self._device)
            if len(self._elements) > _MAX_KNOWN_EXTENTS:
                self._elements.popitem(last=False)
        self._elements.move_to_end(key)
        return self._elements[key]

    def _sums(self, words: torch.Tensor, block_ids: Sequence[int]) -> torch.Tensor:
        """Weighted word sums of these rows, int64 [len(block_ids)], wrapping modulo 2^64. One pass over memory."""
        if not self._is_host:
            return self._device_sums(words, block_ids)
        weights = self._weights[: words.shape[1]]
        runs = adjacent_runs(block_ids, max_blocks=len(block_ids))
        return torch.cat([torch.mv(words[block_ids[s] : block_ids[s] + n], weights) for s, n in runs])

    def _device_sums(
        self, words: torch.Tensor, block_ids: Sequence[int], places: torch.Tensor | None = None
    ) -> torch.Tensor:
        from atom_cluster.kv_transfer.block_sums import block_sums

        with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
            return block_sums(words, self._on_device(block_ids), self._weights, places)

    def _on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def _prepare(device: torch.device) -> None:
    """So that no tag waits for a compiler."""
    try:
        from atom_cluster.kv_transfer.block_sums import compile_sums
    except ImportError as exc:
        raise TransferError(f"tags of memory on {device} need Triton: pip install 'triton>=3.4' ({exc})") from exc
    with torch.cuda.device(device):
        compile_sums(device)


def odd_weights(num_words: int) -> torch.Tensor:
    """The first `num_words` weights: int64, odd, a fixed function of their index (splitmix64)."""
    state = np.arange(1, num_words + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(_WEIGHTS_SEED)
    return torch.from_numpy((_mixed(state) | np.uint64(1)).view(np.int64))


def _width(extents: Sequence[Extent]) -> int:
    """Bytes of the widest elements that all of these are made of."""
    return math.gcd(WORD_BYTES, *(n for e in extents for n in (e.offset, e.num_bytes, e.stride)))


def _tags(sums: torch.Tensor, epoch: int) -> tuple[int, ...]:
    """From word sums; distinct ones of an epoch have distinct tags. Waits for the device."""
    return tuple(_mixed(sums.cpu().numpy().view(np.uint64) + np.uint64(epoch * _GOLDEN & _MASK)).tolist())


def _mixed(state: WordArray) -> WordArray:
    """One-to-one (splitmix64)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
    return state ^ (state >> np.uint64(31))


def _word_rows(region: KvRegion) -> torch.Tensor:
    """The region as int64 [num_blocks, words of a block]."""
    rows = byte_rows(region)
    if any(n % WORD_BYTES for n in (rows.shape[1], rows.stride(0), rows.storage_offset())):
        raise TransferError(
            f"region {region.name}: blocks of {rows.shape[1]} bytes, {rows.stride(0)} apart, are not whole 64-bit words"
        )
    return rows.view(torch.int64)
