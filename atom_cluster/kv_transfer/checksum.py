"""A 64-bit content tag per KV block, the same on any device, so that a reader can tell a wrong block from a right one.

A block is read as 64-bit words, and its tag is `sum(word[i] * weight[i]) mod 2^64`, with
fixed pseudo-random odd weights, mixed with the exporting engine's epoch. An odd weight is invertible modulo 2^64, so a
change of any single word always changes the tag; unrelated changes go unnoticed with probability 2^-64 or little more.
It guards against mistakes (stale, torn, misplaced or damaged blocks), not against a forger.

Knows nothing of transports or tickets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.regions import adjacent_runs, byte_rows, check_blocks, shape_of

WORD_BYTES = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WEIGHTS_SEED = 0x61746F6D5F6B7631
_DEVICE_CHUNK_BYTES = 64 << 20


class BlockTagger:
    """Computes the tags of blocks of one rank's cache groups."""

    def __init__(self, regions: Sequence[KvRegion]) -> None:
        """Raises `TransferError` when a region's blocks are not a whole number of aligned 64-bit words."""
        self._shapes = [shape_of(region) for region in regions]
        self._words = [_word_rows(region) for region in regions]
        self._weights = odd_weights(max(words.shape[1] for words in self._words)).to(self._words[0].device)

    def tags(self, group: int, block_ids: Sequence[int], epoch: int) -> tuple[int, ...]:
        """One tag in [0, 2^64) per block. Waits for the device. Raises `TransferError` for a block out of range."""
        check_blocks(self._shapes, group, block_ids, whose="tagged")
        if not block_ids:
            return ()
        return tuple(_mix(value, epoch) for value in self._sums(self._words[group], block_ids).tolist())

    def _sums(self, words: torch.Tensor, block_ids: Sequence[int]) -> torch.Tensor:
        """Weighted word sums of these blocks of one region, int64 [len(block_ids)], wrapping modulo 2^64."""
        weights = self._weights[: words.shape[1]]
        if words.device.type == "cpu":
            # One pass over memory where it lies. Devices have no integer matrix-vector product.
            runs = adjacent_runs(block_ids, max_blocks=len(block_ids))
            return torch.cat([torch.mv(words[block_ids[s] : block_ids[s] + n], weights) for s, n in runs])
        chunk = max(1, _DEVICE_CHUNK_BYTES // (words.shape[1] * WORD_BYTES))
        ids = torch.tensor(block_ids, dtype=torch.int64, device=words.device)
        parts = [ids[first : first + chunk] for first in range(0, len(block_ids), chunk)]
        return torch.cat([(words[part] * weights).sum(dim=1) for part in parts])


def odd_weights(num_words: int) -> torch.Tensor:
    """The first `num_words` weights: int64, odd, a fixed function of their index (splitmix64)."""
    state = np.arange(1, num_words + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(_WEIGHTS_SEED)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
    state = (state ^ (state >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(state.view(np.int64))


def _mix(word_sum: int, epoch: int) -> int:
    """Tag from a (signed) sum and the epoch. One-to-one in the sum, so distinct sums stay distinct."""
    value = (word_sum + epoch * _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _word_rows(region: KvRegion) -> torch.Tensor:
    """The region as int64 [num_blocks, words of a block]."""
    rows = byte_rows(region)
    if any(n % WORD_BYTES for n in (rows.shape[1], rows.stride(0), rows.storage_offset())):
        raise TransferError(
            f"region {region.name}: blocks of {rows.shape[1]} bytes, {rows.stride(0)} apart, are not whole 64-bit words"
        )
    return rows.view(torch.int64)
