"""Memory that other processes of this host can map read-only: what the runner allocates KV blocks in on a CPU.

It is an anonymous memfd, not a file under /dev/shm. A peer opens it as `/proc/<pid>/fd/<fd>`, which the kernel allows
to the same user only. So it has no name that could be guessed, no size limit of a tmpfs mount, no resource tracker,
and nothing is left behind when a process is killed: the memory goes with the last process that maps it.

The mapping, and with it the descriptor that peers open, lives exactly as long as the tensor's storage. So there is
nothing to close: drop the tensor. Knows nothing of blocks, regions or transports.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from dataclasses import dataclass

import torch
from msgspec import Struct

from atom_cluster.errors import TransferError

_MEMFD_NAME = "atom_cluster_kv"
# From <linux/fcntl.h>; Python's fcntl module has them only when it was built on a recent enough system.
_F_ADD_SEALS = 1033
_F_GET_SEALS = 1034
_F_SEAL_SHRINK = 0x0002
_F_SEAL_GROW = 0x0004


class SharedSpan(Struct, frozen=True, kw_only=True):
    """Where a piece of memory is, in terms another process of this host can use."""

    realm: str
    """`host_realm()` of the owner."""
    pid: int
    start_time: int
    """Of the process, in clock ticks since boot: tells a process from a later one with the same pid."""
    fd: int
    """The memfd in the owner's descriptor table."""
    inode: int
    offset_bytes: int
    """Of the piece within the memfd."""


@dataclass(frozen=True, slots=True)
class _Mapping:
    """One line of /proc/self/maps."""

    start: int
    end: int
    offset: int
    inode: int
    path: str


def allocate_shared(num_bytes: int) -> torch.Tensor:
    """A zeroed uint8 tensor of `num_bytes`, page-aligned, that peers of the same user on this host can map.

    Freed with the tensor's storage. Raises `TransferError` when the system has no memfd or not enough memory for it.
    """
    if num_bytes <= 0:
        raise ValueError(f"num_bytes must be positive, got {num_bytes}")
    try:
        fd = os.memfd_create(_MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, num_bytes)
            # Sealed, so that no reader can be killed (SIGBUS) by the memory shrinking under its mapping.
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            mapping = mmap.mmap(fd, num_bytes)
        finally:
            # The mmap object keeps a duplicate of the descriptor for as long as it lives; that one is what peers open.
            os.close(fd)
    except (AttributeError, OSError, ValueError) as exc:
        raise TransferError(f"cannot allocate {num_bytes} bytes of shared memory: {exc}") from exc
    return torch.frombuffer(mapping, dtype=torch.uint8)


def host_realm() -> str:
    """Names the processes that can see each other's /proc: this boot of this host, this pid namespace, this user."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/pid').st_ino}/{os.getuid()}"


def name_in_realm(name: str) -> str:
    """A transport's name that only processes of one host realm have in common: with a digest of it."""
    return f"{name}@{hashlib.blake2b(host_realm().encode(), digest_size=6).hexdigest()}"


def process_start_time(pid: int) -> int | None:
    """Start time of a running process in clock ticks since boot; None when it is gone or only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The second field is the command in parentheses and may itself contain blanks and parentheses.
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def locate(tensor: torch.Tensor) -> SharedSpan:
    """Where the memory of `tensor` is. Raises `TransferError` unless it is a CPU tensor from `allocate_shared`."""
    if tensor.device.type != "cpu":
        raise TransferError(f"memory on {tensor.device} cannot be shared between processes this way")
    address = tensor.data_ptr()
    mapping = next((m for m in _own_mappings() if m.start <= address < m.end), None)
    if mapping is None or not mapping.path.startswith(f"/memfd:{_MEMFD_NAME}"):
        raise TransferError("memory is private to this process: it was not allocated with allocate_shared")
    start_time = process_start_time(os.getpid())
    assert start_time is not None, "this process is running"
    return SharedSpan(
        realm=host_realm(),
        pid=os.getpid(),
        start_time=start_time,
        fd=_find_fd(mapping.inode),
        inode=mapping.inode,
        offset_bytes=address - mapping.start + mapping.offset,
    )


def map_read_only(span: SharedSpan, num_bytes: int) -> mmap.mmap:
    """Map the owner's whole memfd. `num_bytes`, counted from its start, must fit in it.

    Raises `TransferError` when the owner is gone, is another process by now, or is not to be seen from here.
    """
    if span.realm != host_realm():
        raise TransferError("shared memory is on another host, in another pid namespace or of another user")
    try:
        fd = os.open(f"/proc/{span.pid}/fd/{span.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise TransferError(f"cannot open the shared memory of process {span.pid}: {exc}") from exc
    try:
        # Checked after opening: the descriptor then belongs to the process whose start time is compared.
        if process_start_time(span.pid) != span.start_time:
            raise TransferError(f"process {span.pid} is gone")
        if _memfd_inode(f"/proc/self/fd/{fd}") != span.inode:
            raise TransferError(f"descriptor {span.fd} of process {span.pid} is not the shared memory it announced")
        if os.fstat(fd).st_size < num_bytes or not fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK:
            raise TransferError(f"shared memory of process {span.pid} is smaller than announced or not sealed")
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    except OSError as exc:
        raise TransferError(f"cannot map the shared memory of process {span.pid}: {exc}") from exc
    finally:
        os.close(fd)


def _own_mappings() -> list[_Mapping]:
    mappings = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            span, _, offset, _, inode, *path = line.split(maxsplit=5)
            start, _, end = span.partition("-")
            mappings.append(
                _Mapping(int(start, 16), int(end, 16), int(offset, 16), int(inode), path[0].strip() if path else "")
            )
    return mappings


def _find_fd(inode: int) -> int:
    for name in os.listdir("/proc/self/fd"):
        if _memfd_inode(f"/proc/self/fd/{name}") == inode:
            return int(name)
    raise TransferError("the descriptor of the shared memory was closed")


def _memfd_inode(path: str) -> int | None:
    """Inode of one of our memfds under /proc; None for any other descriptor, or one that was closed meanwhile."""
    try:
        return os.stat(path).st_ino if os.readlink(path).startswith(f"/memfd:{_MEMFD_NAME}") else None
    except FileNotFoundError:
        return None
