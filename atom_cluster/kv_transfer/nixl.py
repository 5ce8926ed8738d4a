"""Transport over NIXL: RDMA between hosts, straight between the memories of GPUs; within a host without RDMA devices.

Two agents per rank: peers read from one, which stays the same while the rank lives; the other reads, and is given up
and made anew when a read cannot be ended otherwise (`nixl_reader.py`). What NIXL's own listener would exchange travels
in our descriptor, whose authenticity is checked before UCX sees it.

What it cannot keep: UCX does not ask who connects. The keys in the descriptor are all that a reader needs, and whoever
reaches UCX may write, too (`nixl_fabric.py`): everybody on the RDMA network, or on this host where there is none. So
`auto` does not take this transport; it has to be named. NIXL's wheels know CUDA, not ROCm. Not run over RDMA yet.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Sequence

import msgspec
import torch
from msgspec import Struct

from atom_cluster.config.env import MIN_SECRET_BYTES
from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.nixl_agent import Memory, NixlAgent
from atom_cluster.kv_transfer.nixl_fabric import Fabric, find_fabric
from atom_cluster.kv_transfer.nixl_reader import BlockLayout, BlockReader, PeerMemory, ReadOrder
from atom_cluster.kv_transfer.pieces import PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion, ReadCompletion
from atom_cluster.kv_transfer.regions import RegionShape, byte_rows, check_peer, check_read, shape_of
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.units import Deadline

_MAX_DESCRIPTOR_BYTES = 256 * 1024
_WORKED_S = 50e-6
"""Making progress takes longer than this only if there was something to do; then there may be more."""
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.0001, 0.005


class NixlRegion(Struct, frozen=True, kw_only=True):
    """One region of a peer and where its memory is."""

    shape: RegionShape
    address: int
    """Of block 0, in the peer's process."""
    stride_bytes: int
    """From one block to the next."""


class NixlDescriptor(Struct, frozen=True, kw_only=True):
    """What a rank announces."""

    rank: int
    memory_kind: str
    """NIXL's word: `DRAM` or `VRAM`."""
    device: int
    """Number of the GPU in the peer's process."""
    regions: tuple[NixlRegion, ...]
    metadata: bytes
    """Of the agent, which has another name in every incarnation of the process: where it is, keys to its memory."""


class SealedDescriptor(Struct, frozen=True, kw_only=True):
    """Msgpack-encoded it is the descriptor."""

    body: bytes
    """A `NixlDescriptor`, encoded."""
    proof: bytes
    """HMAC-SHA256 of `body`, by somebody who knows the cluster's secret."""


class NixlTransport:
    """`KvTransport` over NIXL. Owns an agent to be read from since `export`, one that reads, and a thread for each."""

    def __init__(self, *, rank: int, secret: bytes, fabric: Fabric) -> None:
        """Raises `TransferError` for a secret under 16 bytes."""
        if len(secret) < MIN_SECRET_BYTES:
            raise TransferError(f"the cluster secret has {len(secret)} bytes; at least {MIN_SECRET_BYTES} are needed")
        self.name = fabric.transport_name
        self._rank = rank
        self._key = hmac.digest(secret, b"atom_cluster kv nixl 1", hashlib.sha256)
        self._fabric = fabric
        self._shapes: tuple[RegionShape, ...] = ()
        self._peer_shapes: dict[str, tuple[RegionShape, ...]] = {}
        self._under_way: set[int] = set()
        self._refused: list[ReadCompletion] = []
        self._exporter: _Exporter | None = None
        self._reader: BlockReader | None = None

    def export(self, regions: tuple[KvRegion, ...]) -> bytes:
        """See `KvTransport`. Registers the memory, which for large ones takes a moment."""
        rows = [byte_rows(region) for region in regions]
        memory = Memory.of(rows[0].device)
        layouts = [BlockLayout(row.data_ptr(), row.stride(0), row.shape[1]) for row in rows]
        spans = _spans(layouts, [row.shape[0] for row in rows])

        def make_agent() -> NixlAgent:
            _use_device(rows[0].device)
            name = f"rank {self._rank} {secrets.token_hex(16)}"
            return NixlAgent(name, spans=spans, memory=memory, fabric=self._fabric)

        agent = make_agent()
        self._shapes = tuple(shape_of(region) for region in regions)
        descriptor = NixlDescriptor(
            rank=self._rank,
            memory_kind=memory.kind,
            device=memory.device,
            regions=tuple(
                NixlRegion(shape=shape, address=layout.address, stride_bytes=layout.stride_bytes)
                for shape, layout in zip(self._shapes, layouts, strict=True)
            ),
            metadata=agent.metadata,
        )
        self._exporter = _Exporter(agent, rows[0].device)
        self._reader = BlockReader(make_agent=make_agent, layouts=layouts)
        body = msgspec.msgpack.encode(descriptor)
        return msgspec.msgpack.encode(SealedDescriptor(body=body, proof=self._proof(body)))

    def connect(self, peer: str, descriptor: bytes, shape: PeerShape | None = None) -> None:
        """See `KvTransport`. Whether the peer can be reached is told by reads."""
        if self._reader is None:
            raise TransferError("export this rank's regions before connecting")
        if peer in self._peer_shapes:
            return
        remote = self._unseal(descriptor)
        shapes = tuple(region.shape for region in remote.regions)
        check_peer(self._shapes, self._rank, shapes, remote.rank, shape)
        layouts = [
            BlockLayout(region.address, region.stride_bytes, region.shape.block_bytes) for region in remote.regions
        ]
        memory = Memory(remote.memory_kind, remote.device)
        self._reader.connect(peer, PeerMemory(remote.metadata, memory, tuple(layouts)))
        self._peer_shapes[peer] = shapes

    def start_read(
        self,
        read_id: int,
        peer: str,
        group: int,
        remote_blocks: tuple[int, ...],
        local_blocks: tuple[int, ...],
        deadline: Deadline,
        pieces: tuple[Piece, ...] | None = None,
    ) -> None:
        """See `KvTransport`."""
        if read_id in self._under_way:
            raise TransferError(f"read {read_id} is under way already")
        try:
            if self._reader is None or peer not in self._peer_shapes:
                raise TransferError(f"unknown peer {peer}")
            check_read(self._shapes, self._peer_shapes[peer], group, remote_blocks, local_blocks, pieces)
            if pieces is not None and not pieces:
                raise TransferError("no pieces of blocks to read")
        except TransferError as exc:
            self._refused.append(ReadCompletion(read_id, str(exc), 0, 0.0))
            return
        self._under_way.add(read_id)
        self._reader.start(ReadOrder(read_id, peer, group, remote_blocks, local_blocks, deadline, pieces))

    def poll(self) -> list[ReadCompletion]:
        """See `KvTransport`. Raises `TransferError` if a thread of the transport has failed."""
        if self._reader is None or self._exporter is None:
            completions, self._refused = self._refused, []
            return completions
        self._exporter.check_alive()
        completions, self._refused = self._refused + self._reader.poll(), []
        self._under_way.difference_update(completion.read_id for completion in completions)
        return completions

    def disconnect(self, peer: str) -> None:
        """See `KvTransport`."""
        if self._reader is not None and self._peer_shapes.pop(peer, None) is not None:
            self._reader.disconnect(peer)

    def close(self) -> None:
        """See `KvTransport`. Raises `TransferError` if an agent cannot be destroyed."""
        for part in (self._reader, self._exporter):
            if part is not None:
                part.close()
        self._peer_shapes.clear()

    def _proof(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, hashlib.sha256)

    def _unseal(self, descriptor: bytes) -> NixlDescriptor:
        if len(descriptor) > _MAX_DESCRIPTOR_BYTES:
            raise TransferError(f"nixl descriptor of {len(descriptor)} bytes is too large")
        try:
            sealed = msgspec.msgpack.decode(descriptor, type=SealedDescriptor)
            # Before anything else: UCX would follow whatever stands in it.
            if not hmac.compare_digest(sealed.proof, self._proof(sealed.body)):
                raise TransferError("a nixl descriptor was damaged, or made with another secret")
            return msgspec.msgpack.decode(sealed.body, type=NixlDescriptor)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise TransferError(f"not a nixl descriptor: {exc}") from exc


class _Exporter:
    """The agent that peers read from, and a thread that lets it work.

    Reads do not need it, but whoever connects does.
    """

    def __init__(self, agent: NixlAgent, device: torch.device) -> None:
        self._agent = agent
        self._device = device
        self._failure: str | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._main, name="kv-nixl-export", daemon=True)
        self._thread.start()

    def check_alive(self) -> None:
        """Raise `TransferError` if the thread has failed."""
        if self._failure is not None:
            raise TransferError(f"the NIXL agent that exports has failed: {self._failure}")

    def close(self) -> None:
        """Stop and destroy the agent; nobody can read afterwards. Idempotent."""
        self._closing.set()
        self._thread.join()
        self._agent.close()

    def _main(self) -> None:
        _use_device(self._device)
        pause_s = 0.0
        while not self._closing.wait(pause_s):
            begun_s = time.monotonic()
            try:
                self._agent.progress()
            except TransferError as exc:
                self._failure = str(exc)
                return
            worked = time.monotonic() - begun_s > _WORKED_S
            pause_s = 0.0 if worked else min(max(2 * pause_s, _MIN_PAUSE_S), _MAX_PAUSE_S)


def open_transport(settings: TransportSettings) -> NixlTransport:
    """For the registry. Raises `TransferError` for `auto`: who names it accepts that it trusts the network."""
    if not settings.is_named:
        raise TransferError("it trusts everybody on the RDMA network, so it has to be named")
    return NixlTransport(rank=settings.rank, secret=settings.secret, fabric=find_fabric())


def _use_device(device: torch.device) -> None:
    """Let UCX find the context of the GPU in the calling thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _spans(layouts: Sequence[BlockLayout], num_blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Start and length of the memory that all regions lie in, each byte once: regions may interleave.

    Those that only touch stay apart: they may be two allocations of a GPU's driver, which cannot be shared as one.
    """
    ends = [
        layout.address + (count - 1) * layout.stride_bytes + layout.block_bytes
        for layout, count in zip(layouts, num_blocks, strict=True)
    ]
    spans: list[tuple[int, int]] = []
    for start, end in sorted(zip((layout.address for layout in layouts), ends, strict=True)):
        if spans and start < spans[-1][0] + spans[-1][1]:
            first, length = spans[-1]
            spans[-1] = (first, max(length, end - first))
        else:
            spans.append((start, end - start))
    return spans
