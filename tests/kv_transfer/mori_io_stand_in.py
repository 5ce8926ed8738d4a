"""A stand-in for MORI-IO: its signatures as published, and what its sources say it does. Copies go through sockets.

Nothing here was run next to the real package. It is as unforgiving: an engine's queue pairs to a peer stay broken after
an error; a transfer fails at its first error while the rest of it goes on; sessions wait for the peer's control port as
long as MORI_IO_CP_TIMEOUT_MS; statuses are written to by other threads, and what would be a crash there (a status that
is dropped or asked too late, an engine closed under a call) is noted in `CRIMES`. It differs from RDMA in that a peer
that stands still answers no reads either.
"""

# ruff: noqa: N802 these are MORI's names
from __future__ import annotations

import ctypes
import inspect
import os
import queue
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from atom_cluster.kv_transfer.mori import MoriTransport
from atom_cluster.kv_transfer.registry import TransportSettings
from tests.published_signatures import read_signatures

SIGNATURES = read_signatures(Path(__file__).parent / "mori_io_signatures.json")
BINDINGS = "amd-mori 1.2.4 bindings"
VERSIONS = tuple(version for version in SIGNATURES if version != BINDINGS)
NEWEST = "amd-mori 1.2.4"
ENGINE = "mori.io.engine:IOEngine"

CRIMES: list[str] = []
_PIECE_BYTES = 256 * 1024
_REQUEST = struct.Struct("<IQQ")
_MEMORY = struct.Struct("<I")
_SIZE = struct.Struct("<q")


class Faults:
    """What goes wrong in this process's transfers."""

    has_nic = True
    before_write: Callable[[Any, int], None] | None = None
    """Called with a transfer and the number of its segment before bytes are written; a RuntimeError is its failure."""
    loses_statuses = False
    """Transfers end without anybody being told."""
    call_error: str | None = None
    """`batch_read` raises it, after it has issued all."""
    control_port = 0
    """Where engines listen; 0: anywhere."""


FAULTS = Faults()
ENGINES: weakref.WeakSet[IOEngine] = weakref.WeakSet()
"""All there are, in this process."""


def _members(name: str) -> Any:
    members = {member: member for member in SIGNATURES[BINDINGS][f"mori.io:{name}"].parameters}
    return Enum(name, members)  # type: ignore[misc]


BackendType: Any = _members("BackendType")
MemoryLocationType: Any = _members("MemoryLocationType")
PollCqMode: Any = _members("PollCqMode")
StatusCode: Any = _members("StatusCode")
PeerFailureReason: Any = _members("PeerFailureReason")


class _Values:
    """Named values: those of the published signature, packed as a list in MORI's order."""

    _packed: tuple[tuple[str, type], ...] = ()

    def __init__(self, **values: Any) -> None:
        SIGNATURES[BINDINGS][f"mori.io:{type(self).__name__}"].bind_partial(**values)
        self.__dict__.update(values)

    def pack(self) -> bytes:
        return msgspec.msgpack.encode([getattr(self, name) for name, _ in self._packed])

    @classmethod
    def unpack(cls, packed: bytes, /) -> Any:
        try:
            values = msgspec.msgpack.decode(packed, type=list)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise RuntimeError(f"insufficient bytes: {exc}") from exc
        if [type(value) for value in values] != [kind for _, kind in cls._packed]:
            raise RuntimeError("std::bad_cast")
        return cls(**{name: value for (name, _), value in zip(cls._packed, values)})


class EngineDesc(_Values):
    _packed = (("key", str), ("node_id", str), ("hostname", str), ("host", str), ("port", int), ("pid", int))


class MemoryDesc(_Values):
    _packed = (
        ("engine_key", str),
        ("id", int),
        ("device_id", int),
        ("device_bus_id", str),
        ("data", int),
        ("size", int),
        ("loc", str),
        ("ipc_handle", bytes),
        ("numa_node", int),
    )


class IOEngineConfig(_Values):
    pass


class RdmaBackendConfig(_Values):
    pass


class PeerFailureEvent(_Values):
    pass


class TransferStatus:
    def __init__(self) -> None:
        self.code = StatusCode.INIT
        self.message = ""
        self.transfer: _Transfer | None = None

    def Code(self) -> Any:
        transfer = self.transfer
        if transfer is not None and transfer.engine.is_closed and self.code == StatusCode.IN_PROGRESS:
            CRIMES.append("a status was asked after its engine had closed")
        return self.code

    def Message(self) -> str:
        return self.message

    def Init(self) -> bool:
        return self.Code() == StatusCode.INIT

    def InProgress(self) -> bool:
        return self.Code() == StatusCode.IN_PROGRESS

    def Succeeded(self) -> bool:
        return self.Code() == StatusCode.SUCCESS

    def Failed(self) -> bool:
        return self.Code().name.startswith("ERR")

    def __del__(self) -> None:
        transfer = self.transfer
        if transfer is not None and transfer.num_open and not transfer.engine.is_closed:
            CRIMES.append("a status was dropped that MORI still writes to")


class _Transfer:
    """Segments under way; its status is known by a pointer that keeps nothing alive."""

    def __init__(self, engine: IOEngine, status: TransferStatus, num_segments: int, remote_key: str) -> None:
        self.engine = engine
        self.num_segments = self.num_open = num_segments
        self.remote_key = remote_key
        self._status = weakref.ref(status)
        self._lock = threading.Lock()
        status.transfer = self

    def update(self, code: Any, message: str) -> None:
        status = self._status()
        if status is not None and not status.code.name.startswith("ERR") and not FAULTS.loses_statuses:
            status.message, status.code = message, code

    def end_segment(self, error: str | None) -> None:
        with self._lock:
            if error is not None:
                self.update(StatusCode.ERR_RDMA_OP, error)
            elif self.num_open == 1:
                self.update(StatusCode.SUCCESS, "success")
            self.num_open -= 1


class _QueuePair:
    """A connection that reads a peer's memory, in order, until the first error."""

    def __init__(self, engine: IOEngine, sock: socket.socket) -> None:
        self._engine = engine
        self._socket = sock
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._broken: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def post(self, transfer: _Transfer, index: int, local: MemoryDesc, to: int, remote: int, fro: int, n: int) -> None:
        self._requests.put((transfer, index, local, to, remote, fro, n))

    def close(self) -> None:
        self._requests.put(None)
        _shut_down(self._socket)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            transfer, index, *rest = request
            if self._broken is None:
                try:
                    self._read(transfer, index, *rest)
                except (OSError, RuntimeError) as exc:
                    self._broken = f"transport retry counter exceeded ({exc})"
                    transfer.end_segment(self._broken)
                else:
                    transfer.end_segment(None)
            else:
                transfer.end_segment("Work Request Flushed Error")

    def _read(self, transfer: _Transfer, index: int, local: Any, to: int, remote: int, fro: int, size: int) -> None:
        self._socket.sendall(_REQUEST.pack(remote, fro, size))
        piece = bytearray(min(size, _PIECE_BYTES))
        for done in range(0, size, _PIECE_BYTES):
            view = memoryview(piece)[: min(_PIECE_BYTES, size - done)]
            _receive_into(self._socket, view)
            if FAULTS.before_write is not None:
                FAULTS.before_write(transfer, index)
            with self._engine.memory_lock:
                if local.id not in self._engine.memories:
                    raise RuntimeError("local protection error")
                ctypes.memmove(local.data + to + done, (ctypes.c_char * len(view)).from_buffer(piece), len(view))


class IOEngine:
    def __init__(self, key: str, config: IOEngineConfig) -> None:
        assert type(key) is str and type(config) is IOEngineConfig
        self._desc = EngineDesc(
            key=key, node_id="here", hostname="here", host=config.host, port=config.port, pid=os.getpid()
        )
        self.memories: dict[int, MemoryDesc] = {}
        self.memory_lock = threading.Lock()
        self.failures: list[PeerFailureEvent] = []
        self.is_closed = False
        self._num_memories = self._num_transfers = self._num_inside = 0
        self._control_port: _ControlPort | None = None
        self._remotes: dict[str, EngineDesc] = {}
        self._queue_pairs: dict[str, list[_QueuePair]] = {}
        self._remote_sizes: dict[tuple[str, int], int] = {}
        self._build_locks: dict[str, threading.Lock] = {}
        self._control_lock = threading.Lock()
        """MORI's is held while it connects, and by calls with the interpreter locked."""
        ENGINES.add(self)

    def get_engine_desc(self) -> EngineDesc:
        return EngineDesc(**{name: getattr(self._desc, name) for name, _ in EngineDesc._packed})

    def create_backend(self, type: Any, config: Any = None) -> None:
        if type == BackendType.TCP:
            if config is None:
                raise NotImplementedError("backend not implemented yet")
            os.abort()
        assert type == BackendType.RDMA and isinstance(config, RdmaBackendConfig)
        assert config.enable_notification is False and config.qp_per_transfer > 0
        if not FAULTS.has_nic:
            if os.environ.get("MORI_DISABLE_AUTO_XGMI") != "0":
                raise RuntimeError("no active RDMA device on this host; set MORI_DISABLE_AUTO_XGMI=0")
            self._desc.port = 1
            return
        self._control_port = _ControlPort(self, self._desc.host, FAULTS.control_port)
        self._desc.port = self._control_port.port

    def remove_backend(self, type: Any) -> None:
        if type != BackendType.RDMA or self._control_port is None:
            return
        if self._num_inside:
            CRIMES.append("an engine was closed under a call")
        self._control_port.close()
        self._control_port = None
        for pairs in self._queue_pairs.values():
            for pair in pairs:
                pair.close()
        self._queue_pairs.clear()
        self.is_closed = True

    def register_remote_engine(self, engine_desc: EngineDesc) -> None:
        with self._control_lock:
            self._remotes[engine_desc.key] = engine_desc

    def deregister_remote_engine(self, engine_desc: EngineDesc) -> None:
        with self._control_lock:
            self._remotes.pop(engine_desc.key, None)

    def register_memory(self, ptr: int, size: int, device_id: int, mem_loc: Any) -> MemoryDesc:
        assert type(ptr) is type(size) is int and ptr > 0 and size > 0
        assert (device_id, mem_loc) == (-1, MemoryLocationType.CPU), "there are no GPUs here"
        if any(memory.data == ptr for memory in self.memories.values()):
            CRIMES.append("memory was registered twice with one engine")
        memory = MemoryDesc(
            engine_key=self._desc.key,
            id=self._num_memories,
            device_id=device_id,
            device_bus_id="",
            data=ptr,
            size=size,
            loc=mem_loc.name,
            ipc_handle=bytes(64),
            numa_node=0,
        )
        self._num_memories += 1
        self.memories[memory.id] = memory
        return memory

    def deregister_memory(self, mem_desc: MemoryDesc) -> None:
        with self.memory_lock:
            self.memories.pop(mem_desc.id, None)

    def allocate_transfer_uid(self) -> int:
        self._num_transfers += 1
        return self._num_transfers - 1

    def batch_read(self, *args: Any) -> list[TransferStatus]:
        SIGNATURES[NEWEST][f"{ENGINE}._batch_single_side_transfer"].bind(None, *args)
        local, local_offsets, remote, remote_offsets, sizes, uids = args
        statuses = [TransferStatus() for _ in sizes]
        self._num_inside += 1
        try:
            for i, status in enumerate(statuses):
                assert type(uids[i]) is int
                self._read(local[i], local_offsets[i], remote[i], remote_offsets[i], sizes[i], status, uids[i])
        finally:
            self._num_inside -= 1
        if FAULTS.call_error is not None:
            raise RuntimeError(FAULTS.call_error)
        return statuses

    def pop_peer_failure(self) -> PeerFailureEvent | None:
        return self.failures.pop(0) if self.failures else None

    def _read(
        self, local: Any, to: list[int], remote: Any, fro: list[int], sizes: list[int], status: Any, uid: int
    ) -> None:
        if self._control_port is None or remote.engine_key not in self._remotes:
            status.message = "No available backend found, create backend first"
            status.code = StatusCode.ERR_BAD_STATE
            return
        pairs = self._session(remote)
        status.code = StatusCode.IN_PROGRESS
        if any(
            t + n > local.size or f + n > remote.size or n > 0xFFFFFFFF for t, f, n in zip(to, fro, sizes, strict=True)
        ):
            status.message, status.code = "length out of range", StatusCode.ERR_INVALID_ARGS
            return
        transfer = _Transfer(self, status, len(sizes), remote.engine_key)
        for index, (t, f, n) in enumerate(zip(to, fro, sizes, strict=True)):
            pairs[(uid + index) % len(pairs)].post(transfer, index, local, t, remote.id, f, n)

    def _session(self, remote: Any) -> list[_QueuePair]:
        with self._build_locks.setdefault(remote.engine_key, threading.Lock()):
            pairs = self._queue_pairs.setdefault(remote.engine_key, [])
            while len(pairs) < 2:
                pairs.append(_QueuePair(self, self._call(remote.engine_key, b"E")))
            if (remote.engine_key, remote.id) not in self._remote_sizes:
                with self._call(remote.engine_key, b"A" + _MEMORY.pack(remote.id)) as sock:
                    (size,) = _SIZE.unpack(_receive(sock, _SIZE.size))
                if size != remote.size:
                    raise RuntimeError(f"remote MR size mismatch for engine {remote.engine_key} got={size}")
                self._remote_sizes[remote.engine_key, remote.id] = size
            return pairs

    def _call(self, key: str, message: bytes) -> socket.socket:
        """A connection to a peer's control port that answered."""
        timeout_s = int(os.environ.get("MORI_IO_CP_TIMEOUT_MS", "5000")) / 1000
        remote = self._remotes.get(key)
        if remote is None:
            raise RuntimeError(f"remote engine {key} is not registered")
        try:
            with self._control_lock:
                address = (socket.inet_ntoa(socket.inet_aton(remote.host)), remote.port)
                sock = socket.create_connection(address, timeout_s)
            try:
                sock.sendall(message)
                assert _receive(sock, 1) == b"!"
            except BaseException:
                sock.close()
                raise
        except (OSError, OverflowError) as exc:
            raise RuntimeError(f"connect({remote.host}:{remote.port}): {exc}") from exc
        sock.settimeout(None)
        return sock


class _ControlPort:
    """What strangers may ask of an engine: everything."""

    def __init__(self, engine: IOEngine, host: str, port: int) -> None:
        self._engine = engine
        self._listener = socket.create_server((host, port))
        self.port = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for connection in self._connections:
            _shut_down(connection)
        for thread in self._threads[1:]:
            thread.join()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if _receive(connection, 1) == b"A":
                (memory_id,) = _MEMORY.unpack(_receive(connection, _MEMORY.size))
                memory = self._engine.memories.get(memory_id)
                connection.sendall(b"!" + _SIZE.pack(-1 if memory is None else memory.size))
                return
            connection.sendall(b"!")
            while True:
                memory_id, offset, size = _REQUEST.unpack(_receive(connection, _REQUEST.size))
                source = self._engine.memories[memory_id]
                assert offset + size <= source.size
                connection.sendall((ctypes.c_char * size).from_address(source.data + offset))
        except (OSError, KeyError, AssertionError):
            pass
        finally:
            _shut_down(connection)


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _receive(sock: socket.socket, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    _receive_into(sock, memoryview(data))
    return bytes(data)


def _receive_into(sock: socket.socket, view: memoryview) -> None:
    while len(view):
        received = sock.recv_into(view)
        if not received:
            raise ConnectionResetError("the peer is gone")
        view = view[received:]


def _published(method: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """A method that takes what the signature says; by keyword, unless it has no names to say."""

    @wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = [name for name, one in signature.parameters.items() if one.kind is not one.VAR_POSITIONAL]
        assert not (args and names), "calls are by keyword"
        signature.bind(*args, **kwargs)
        return method(self, *args, **kwargs)

    return checked


def make_module(version: str = NEWEST) -> ModuleType:
    """What `mori.io` is in this version."""
    published = {
        name: _published(getattr(IOEngine, name), signature)
        for module_and_name, signature in SIGNATURES[version].items()
        if (name := module_and_name.removeprefix(f"{ENGINE}.")) == "__init__" or not name.startswith("_")
    }
    members = {name: member for name, member in vars(IOEngine).items() if name not in ("__dict__", "__weakref__")}
    if "pop_peer_failure" not in published:
        del members["pop_peer_failure"]
    io = ModuleType("mori.io")
    names = (BackendType, MemoryLocationType, PollCqMode, StatusCode, EngineDesc, MemoryDesc, IOEngineConfig)
    for value in (*names, RdmaBackendConfig, type("IOEngine", (), {**members, **published})):
        setattr(io, value.__name__, value)
    return io


def open_over_stand_in(settings: TransportSettings, version: str = NEWEST) -> MoriTransport:
    """The transport over the stand-in, for memory of the CPU."""
    return MoriTransport(make_module(version), rank=settings.rank, host=settings.host, secret=settings.secret)
