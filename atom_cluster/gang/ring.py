"""Ring: shared memory that one process writes and others of the same host read. Knows only bytes and positions.

A position counts all bytes ever written, so it never wraps; where it lies in memory is the position modulo the size.
Neither end stores positions here: who may read or overwrite what is agreed over sockets (`shm_sender`), whose system
calls also order the memory accesses on every processor.
"""

from __future__ import annotations

import mmap
import os


class Ring:
    """A mapping of an anonymous memory file. The memory is freed when the last process that maps it is gone."""

    def __init__(self, fd: int, num_bytes: int, *, is_writable: bool) -> None:
        """Map `num_bytes` of a memory file. `fd` stays the caller's."""
        self.num_bytes = num_bytes
        access = mmap.ACCESS_WRITE if is_writable else mmap.ACCESS_READ
        self._memory = mmap.mmap(fd, num_bytes, access=access)

    def write(self, position: int, data: memoryview) -> None:
        """Store bytes at a position; no more than the ring's size."""
        start = position % self.num_bytes
        head = min(len(data), self.num_bytes - start)
        self._memory[start : start + head] = data[:head]
        if head < len(data):
            self._memory[: len(data) - head] = data[head:]

    def read(self, position: int, num_bytes: int) -> bytes:
        """A copy of the bytes at a position."""
        start = position % self.num_bytes
        head = min(num_bytes, self.num_bytes - start)
        data = self._memory[start : start + head]
        return data if head == num_bytes else data + self._memory[: num_bytes - head]

    def close(self) -> None:
        """Unmap; idempotent."""
        self._memory.close()


def create_memory_file(num_bytes: int) -> int:
    """A descriptor of new anonymous shared memory; it has no name and vanishes with the processes that hold it."""
    fd = os.memfd_create("atom_cluster_plans", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd
