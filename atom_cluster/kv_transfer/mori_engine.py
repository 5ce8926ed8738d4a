"""MORI-IO engines: the only file that talks to `mori.io`. One engine lends a rank's memory, another one reads.

What MORI-IO does (amd-mori 1.2.4, from its sources; nothing here was run on AMD hardware), and what follows from it:

- A transfer cannot be cancelled. `ReadingEngine.close` is the only way to know that one has ended: it waits for copies
  between GPUs, takes the memory's registration away from the NICs and destroys the queue pairs.
- A status says "failed" at the first error, when other operations of the same transfer may still be writing, and the
  peer's queue pairs stay broken as long as the engine lives. So a failure, too, ends with `close`.
- MORI's threads write to a status through a bare pointer: each is kept until it succeeded or its engine is closed, and
  none is looked at after that.
- An engine keeps registrations by address. What is lent and what is read into is the same memory, therefore a rank has
  two engines: the one that reads can be closed without anything lent being withdrawn.
- `create_session` talks to the peer, seconds if it does not answer, with the interpreter locked. `batch_read` of an
  engine makes and keeps the same sessions, per pair of memories, with the interpreter free. It is called with one pair
  at a time: when it raises, statuses of other pairs would be lost while they are written to.
- Nobody has to prove anything to an engine's control port, and memory is registered for remote writes as well. The
  network has to keep strangers away from the ports of `host`, and from the RDMA fabric.
- Each engine keeps a core busy: it polls for completions, whatever its `PollCqMode`.

`BackendType.TCP` aborts the process; it must not be created. Which NICs are used is the operator's choice, with
MORI_RDMA_DEVICES; MORI_DISABLE_AUTO_XGMI=1 turns copies between the GPUs of one host off.
"""

from __future__ import annotations

import importlib
import ipaddress
import secrets
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

from atom_cluster.config.env import default_variable
from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.mori_plan import Batch, ChunkLayout
from atom_cluster.units import Deadline

IDENTITY_BYTES = 16
MAX_OPENINGS = 256
"""Of peers, in the life of one engine: MORI does not free the queue pairs of peers that have left."""

_XGMI_ONLY_PORT = 1
"""What MORI says its control port is when it found no NIC."""
_ENVIRONMENT = {
    # Copies between GPUs of one host, where they can reach each other; NICs otherwise.
    "MORI_DISABLE_AUTO_XGMI": "0",
    # How long a peer that stands still holds a thread, and with it `close`. MORI's own choice is 5000.
    "MORI_IO_CP_TIMEOUT_MS": "1000",
}
"""Set where the operator has not: MORI has no other way to say these."""
_QUEUE_PAIRS_PER_PEER = 4
_OPEN_TIMEOUT_S = 10.0
_OPEN_POLL_S = 0.0005
_KNOCK_TIMEOUT_S = 1.0
_MAX_FAILURES = 64
_EVERYBODY = ""
"""Key of the peer in a failure that is of a device or a port."""


def load_mori_io() -> ModuleType:
    """`mori.io`. Raises `TransferError` that says what is missing; without ROCm the import ends in an OSError."""
    try:
        return importlib.import_module("mori.io")
    except (ImportError, OSError) as exc:
        raise TransferError(f"MORI-IO needs ROCm and the package amd-mori (pip install amd-mori): {exc}") from exc


@dataclass(frozen=True, slots=True)
class Span:
    """Memory to register; whoever owns it keeps it alive longer than the engine."""

    address: int
    num_bytes: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class RemoteRank:
    """A peer's engine and memory, as its descriptor says; values of MORI's own types."""

    engine: Any
    identity: Any
    identity_bytes: bytes
    chunks: tuple[tuple[Any, ...], ...]
    """By region, in order of addresses."""
    layouts: tuple[ChunkLayout, ...]

    @property
    def key(self) -> str:
        """MORI's name of the peer's engine: of one incarnation of its process."""
        return str(self.engine.key)


class MoriEngine:
    """An IOEngine, the memory registered with it, and a control port on `host`. Owns them until `close`."""

    def __init__(self, io: ModuleType, *, key: str, host: str, num_workers: int = 1) -> None:
        """key: unique in the cluster and in time. num_workers: threads that issue operations.

        Raises `TransferError` when `host` is not an IPv4 address of this node, or there is neither an RDMA NIC nor a
        GPU that others can reach.
        """
        _check_host(host)
        for name, value in _ENVIRONMENT.items():
            default_variable(name, value)
        self.key = f"{key}:{secrets.token_hex(8)}"
        self._io = io
        self._memories: list[Any] = []
        self._device = torch.device("cpu")
        self._engine = io.IOEngine(key=self.key, config=io.IOEngineConfig(host=host, port=0))
        try:
            self._engine.create_backend(
                type=io.BackendType.RDMA,
                config=io.RdmaBackendConfig(
                    qp_per_transfer=_QUEUE_PAIRS_PER_PEER,
                    post_batch_size=-1,
                    num_worker_threads=num_workers,
                    poll_cq_mode=io.PollCqMode.POLLING,
                    enable_notification=False,
                ),
            )
        except RuntimeError as exc:
            raise TransferError(f"MORI-IO cannot transfer anything here: {exc}") from exc

    @property
    def has_nic(self) -> bool:
        """Whether other hosts can be reached, not only GPUs of this one."""
        return int(self._engine.get_engine_desc().port) != _XGMI_ONLY_PORT

    def describe(self) -> bytes:
        """What a peer's `parse_engine` takes."""
        return bytes(self._engine.get_engine_desc().pack())

    def register(self, span: Span) -> Any:
        """Register memory with the engine; NICs hear of it when it is first used. Returns MORI's description of it."""
        is_gpu = span.device.type == "cuda"
        if is_gpu:
            self._device = span.device
        locations = self._io.MemoryLocationType
        memory = self._engine.register_memory(
            ptr=span.address,
            size=span.num_bytes,
            device_id=span.device.index if is_gpu else -1,
            mem_loc=locations.GPU if is_gpu else locations.CPU,
        )
        self._memories.append(memory)
        return memory

    def close(self) -> None:
        """Let nobody use the memory any more: afterwards neither peers nor transfers under way touch it. Idempotent.

        Takes as long as copies between GPUs that were issued, and some milliseconds; part of it with the interpreter
        locked.
        """
        if self._device.type == "cuda":
            torch.accelerator.synchronize(self._device)
        while self._memories:
            self._engine.deregister_memory(mem_desc=self._memories.pop())
        for backend in (self._io.BackendType.RDMA, self._io.BackendType.XGMI):
            self._engine.remove_backend(type=backend)


class Transfer:
    """A transfer that was issued. `state` may be asked until the engine closes."""

    def __init__(self, status: Any, batch: Batch) -> None:
        self._status = status
        self.batch = batch

    def state(self) -> Literal["under way", "succeeded", "failed"]:
        """Whatever is neither success nor failure, known or not, is still under way."""
        if self._status.Succeeded():
            return "succeeded"
        return "failed" if self._status.Failed() else "under way"

    def message(self) -> str:
        """MORI's words for why it failed."""
        return f"{self._status.Code()}: {self._status.Message()}"


class ReadingEngine(MoriEngine):
    """An engine that reads peers' memory into the local regions, and into a scratch of its own to get acquainted.

    `open` may run in other threads at the same time as `start`; no `open` may be running when `close` is called.
    """

    def __init__(
        self,
        io: ModuleType,
        *,
        key: str,
        host: str,
        regions: Sequence[Sequence[Span]],
        layouts: Sequence[ChunkLayout],
    ) -> None:
        """regions: the chunks of every local region; layouts: of the same. Raises `TransferError` as `MoriEngine`."""
        super().__init__(io, key=key, host=host, num_workers=_QUEUE_PAIRS_PER_PEER)
        self.layouts = layouts
        self._chunks = [[self.register(span) for span in spans] for spans in regions]
        self._scratch = torch.zeros((MAX_OPENINGS, 2 * IDENTITY_BYTES), dtype=torch.uint8, device=regions[0][0].device)
        self._scratch_memory = self.register(span_of(self._scratch))
        self._unfinished: set[Transfer] = set()
        """Whose statuses MORI may still write to."""
        self._broken: set[str] = set()

    def is_broken(self, peer: RemoteRank) -> bool:
        """Whether something failed between this engine and the peer, which may be for good."""
        return not self._broken.isdisjoint((peer.key, _EVERYBODY))

    def open(self, peer: RemoteRank, slot: int, stop: threading.Event, *, is_suspect: bool) -> None:
        """Connect, and get acquainted with all of the peer's memory, so that reads need not wait for the peer's answer.

        slot: of the scratch, below MAX_OPENINGS, for this call alone. is_suspect: the peer failed before, its host may
        be gone; see `_knock`. Blocks: a peer that does not answer costs MORI_IO_CP_TIMEOUT_MS a message. Raises
        `TransferError` when the peer cannot be reached, is another process than the one described, or `stop` was set.
        """
        if is_suspect:
            _knock(str(peer.engine.host), int(peer.engine.port))
        self._engine.register_remote_engine(engine_desc=peer.engine)
        transfers: list[Transfer] = []
        deadline = Deadline.after(_OPEN_TIMEOUT_S)
        try:
            identity = slot * 2 * IDENTITY_BYTES
            transfers.append(self._probe(peer.identity, identity, IDENTITY_BYTES))
            for memory in (memory for memories in peer.chunks for memory in memories):
                if stop.is_set():
                    raise TransferError("the engine is closing")
                transfers.append(self._probe(memory, identity + IDENTITY_BYTES, min(IDENTITY_BYTES, int(memory.size))))
            while (states := {transfer.state() for transfer in transfers}) != {"succeeded"}:
                if "failed" in states or deadline.has_passed or stop.wait(_OPEN_POLL_S):
                    failed = [transfer.message() for transfer in transfers if transfer.state() == "failed"]
                    raise TransferError(failed[0] if failed else "no answer")
        except TransferError as exc:
            if transfers:
                self._broken.add(peer.key)
            raise TransferError(f"cannot open {peer.key}: {exc}") from exc
        self._unfinished.difference_update(transfers)
        if bytes(self._scratch[slot, :IDENTITY_BYTES].tolist()) != peer.identity_bytes:
            raise TransferError(f"cannot open {peer.key}: at its address is another process by now")

    def forget(self, peer: RemoteRank) -> None:
        """The peer has left; it may be opened again."""
        self._engine.deregister_remote_engine(engine_desc=peer.engine)

    def start(self, peer: RemoteRank, region: int, batch: Batch) -> Transfer:
        """Issue a batch of reads in a region from a peer that was opened.

        Raises `TransferError` if MORI does; whether something was issued all the same is then unknown.
        """
        return self._start(self._chunks[region][batch.local_chunk], peer.chunks[region][batch.remote_chunk], batch)

    def finish(self, transfer: Transfer) -> None:
        """The transfer succeeded; nobody needs its status any more."""
        self._unfinished.discard(transfer)

    def take_failures(self) -> list[tuple[str, str]]:
        """What MORI noticed about peers: the event, and the key of a peer's engine, empty if it concerns all of them.

        Each is told once, and the peers it names are broken from now on. Always empty before amd-mori 1.2.4.
        """
        pop = getattr(self._engine, "pop_peer_failure", None)
        failures: list[tuple[str, str]] = []
        while pop is not None and len(failures) < _MAX_FAILURES and (event := pop()) is not None:
            key = str(event.remote_engine_key)
            self._broken.add(key)
            failures.append((key, f"{event.reason}: {event.detail}"))
        return failures

    def close(self) -> None:
        """See `MoriEngine.close`. Statuses may not be asked after it."""
        super().close()
        self._unfinished.clear()

    def _probe(self, memory: Any, scratch_offset: int, num_bytes: int) -> Transfer:
        batch = Batch(0, 0)
        batch.add(scratch_offset, 0, num_bytes)
        return self._start(self._scratch_memory, memory, batch)

    def _start(self, local: Any, remote: Any, batch: Batch) -> Transfer:
        uid = self._engine.allocate_transfer_uid()
        try:
            (status,) = self._engine.batch_read(
                [local], [batch.local_offsets], [remote], [batch.remote_offsets], [batch.sizes], [uid]
            )
        except RuntimeError as exc:
            raise TransferError(f"MORI-IO: {exc}") from exc
        transfer = Transfer(status, batch)
        self._unfinished.add(transfer)
        return transfer


def span_of(rows: torch.Tensor) -> Span:
    """The memory between the first and the last byte of uint8 [n, bytes]; rows may be apart."""
    num_bytes = (rows.shape[0] - 1) * rows.stride(0) + rows.shape[1]
    return Span(rows.data_ptr(), num_bytes, rows.device)


def parse_rank(
    io: ModuleType,
    *,
    engine: bytes,
    identity: bytes,
    identity_bytes: bytes,
    chunks: Sequence[Sequence[bytes]],
    layouts: Sequence[ChunkLayout],
) -> RemoteRank:
    """A peer from what its engine packed. Raises `TransferError` unless all of it belongs together."""
    try:
        remote = RemoteRank(
            engine=io.EngineDesc.unpack(engine),
            identity=io.MemoryDesc.unpack(identity),
            identity_bytes=identity_bytes,
            chunks=tuple(tuple(io.MemoryDesc.unpack(chunk) for chunk in region) for region in chunks),
            layouts=tuple(layouts),
        )
        memories = [remote.identity, *(memory for region in remote.chunks for memory in region)]
        if any(memory.engine_key != remote.key for memory in memories):
            raise TransferError("the memory is of another engine")
    except (RuntimeError, TypeError, ValueError) as exc:
        raise TransferError(f"MORI-IO cannot read what the peer says of itself: {exc}") from exc
    sizes = [[int(memory.size) for memory in region] for region in remote.chunks]
    expected = [[layout.chunk_bytes(chunk) for chunk in range(layout.num_chunks)] for layout in layouts]
    if sizes != expected or {int(remote.identity.size), len(identity_bytes)} != {IDENTITY_BYTES}:
        raise TransferError("the peer's registered memory is not that of its regions")
    return remote


def _knock(host: str, port: int) -> None:
    """Raise `TransferError` if nobody listens there.

    While MORI connects, which takes long if a host is gone, it holds a lock that other calls of the engine wait for,
    some of them with the interpreter locked. Who is at home may log that somebody came and said nothing.
    """
    if port == _XGMI_ONLY_PORT:
        return
    try:
        socket.create_connection((host, port), timeout=_KNOCK_TIMEOUT_S).close()
    except (OSError, OverflowError, ValueError) as exc:
        raise TransferError(f"nobody answers at {host}:{port}: {exc}") from exc


def _check_host(host: str) -> None:
    """MORI parses the address without looking at the result, and ends the process when it cannot bind to it."""
    try:
        address = ipaddress.IPv4Address(host)
        if address.is_unspecified:
            raise TransferError("MORI-IO listens on one address of the node, never on all")
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((str(address), 0))
    except ValueError as exc:
        raise TransferError(f"MORI-IO speaks IPv4 alone; {host!r} is no such address") from exc
    except OSError as exc:
        raise TransferError(f"MORI-IO cannot listen on {host}: {exc}") from exc
