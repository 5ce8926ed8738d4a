"""What a rank announces to be read from through MORI-IO, as bytes. Knows of MORI's types only that they are packed.

Sealed with the cluster's secret: MORI parses what is in it without much suspicion. That says who wrote the descriptor,
not who uses it.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec
from msgspec import Struct

from atom_cluster.config.env import MIN_SECRET_BYTES
from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.mori_plan import ChunkLayout
from atom_cluster.kv_transfer.regions import RegionShape

_MAX_DESCRIPTOR_BYTES = 256 * 1024


class MoriRegion(Struct, frozen=True, kw_only=True):
    """One region of a peer and how it is registered."""

    shape: RegionShape
    stride_bytes: int
    """From one block to the next."""
    blocks_per_chunk: int
    chunks: tuple[bytes, ...]
    """As MORI packs a MemoryDesc."""

    def layout(self) -> ChunkLayout:
        """Raises `TransferError` for numbers that no region has."""
        shape = self.shape
        if (
            min(shape.num_blocks, shape.block_bytes, self.blocks_per_chunk) < 1
            or self.stride_bytes < shape.block_bytes
            or self.blocks_per_chunk > shape.num_blocks
        ):
            raise TransferError(f"region {shape.name} of the peer has an impossible shape")
        return ChunkLayout(shape.num_blocks, shape.block_bytes, self.stride_bytes, self.blocks_per_chunk)


class MoriDescriptor(Struct, frozen=True, kw_only=True):
    """A rank: its process, its engine, its memory."""

    rank: int
    realm: str
    pid: int
    start_time: int
    """Of the process, in clock ticks since boot."""
    engine: bytes
    """As MORI packs an EngineDesc."""
    identity: bytes
    """MemoryDesc of memory that holds `identity_bytes` as long as this export exists; readers compare."""
    identity_bytes: bytes
    regions: tuple[MoriRegion, ...]


class _Sealed(Struct, frozen=True, array_like=True):
    body: bytes
    proof: bytes
    """HMAC-SHA256 of `body`, by somebody who knows the cluster's secret."""


class DescriptorSeal:
    """Turns descriptors into bytes and back. Raises `TransferError` for a secret under 16 bytes."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise TransferError(f"the cluster secret has {len(secret)} bytes; at least {MIN_SECRET_BYTES} are needed")
        self._key = hmac.digest(secret, b"atom_cluster kv mori 1", hashlib.sha256)

    def seal(self, descriptor: MoriDescriptor) -> bytes:
        """Raises `TransferError` if it is too large."""
        body = msgspec.msgpack.encode(descriptor)
        sealed = msgspec.msgpack.encode(_Sealed(body, hmac.digest(self._key, body, hashlib.sha256)))
        if len(sealed) > _MAX_DESCRIPTOR_BYTES:
            num_chunks = sum(len(region.chunks) for region in descriptor.regions)
            raise TransferError(f"{len(descriptor.regions)} regions in {num_chunks} pieces are too many to describe")
        return sealed

    def open(self, sealed: bytes) -> MoriDescriptor:
        """Raises `TransferError` for anything but a descriptor that was sealed with the same secret."""
        if len(sealed) > _MAX_DESCRIPTOR_BYTES:
            raise TransferError(f"mori descriptor of {len(sealed)} bytes is too large")
        try:
            outer = msgspec.msgpack.decode(sealed, type=_Sealed)
            if not hmac.compare_digest(outer.proof, hmac.digest(self._key, outer.body, hashlib.sha256)):
                raise TransferError("a mori descriptor was damaged, or made with another secret")
            return msgspec.msgpack.decode(outer.body, type=MoriDescriptor)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise TransferError(f"not a mori descriptor: {exc}") from exc
