"""Chained hashes of full blocks of tokens: the name under which a prefix's KV is known to engines and the router.

hash_i = xxh64(hash_{i-1} as 8 little-endian bytes || token ids as little-endian int64), hash_{-1} = the seed, which is
derived from the engines' fingerprint. Equal on every machine. A hash is a name, not a proof: whoever reuses KV compares
the token ids as well (`block_pool`). Knows nothing of blocks' storage.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence

import xxhash


def fingerprint_of(fields: Mapping[str, str]) -> str:
    """Digest of everything that must be equal for two engines' blocks to mean the same."""
    text = "\n".join(f"{name}={fields[name]}" for name in sorted(fields))
    return xxhash.xxh3_128_hexdigest(text.encode())


def differences(prefill: Mapping[str, str], decode: Mapping[str, str]) -> str:
    """What differs between the fields of two fingerprints, with both values; for people."""
    names = [name for name in sorted(prefill.keys() | decode.keys()) if prefill.get(name) != decode.get(name)]
    return ", ".join(f"{name} ({prefill.get(name)} on prefill, {decode.get(name)} on decode)" for name in names)


def seed_of(fingerprint: str) -> int:
    """The hash that stands before a prompt's first block."""
    return xxhash.xxh64_intdigest(fingerprint.encode())


def hash_blocks(token_ids: Sequence[int], block_size: int, seed: int) -> tuple[int, ...]:
    """Chained hashes of all full blocks of `token_ids`, each in [0, 2**64)."""
    packed = pack_tokens(token_ids)
    num_bytes = 8 * block_size
    hashes = []
    parent = seed
    for start in range(0, len(packed) - num_bytes + 1, num_bytes):
        parent = hash_block(parent, packed[start : start + num_bytes])
        hashes.append(parent)
    return tuple(hashes)


def hash_block(parent: int, packed_tokens: bytes | memoryview) -> int:
    """Hash of one block that follows the block hashed `parent`."""
    digest = xxhash.xxh64(parent.to_bytes(8, "little"))
    digest.update(packed_tokens)
    return digest.intdigest()


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int64."""
    packed = array("q", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
